/* Every kernel, compiled with the words of the file that includes this, and the table of them. A level that has a
 * better way for one kernel names it after EN_KERNELS in its own table. */
#include "../entrenar.h"

#include "vmath.h"
#include "types.h"

#include "product.h"
#include "attention.h"
#include "attention_backward.h"

#include "adamw.h"
#include "adamw8.h"
#include "convert.h"
#include "dequant.h"
#include "dropout.h"
#include "elementwise.h"
#include "embedding.h"
#include "loss.h"
#include "norm.h"
#include "probe.h"
#include "reduce.h"
#include "rope.h"
#include "softmax.h"
#include "swiglu.h"

#define EN_KERNELS                                                                                      \
    .gemm = gemm, .attention = attention, .attention_backward = attention_backward,                    \
    .copy = copy, .unary = unary, .unary_backward = unary_backward, .binary = binary, .add_inplace =    \
    add_inplace, .scale_inplace = scale_inplace, .sum = sum, .all_finite = all_finite,                  \
    .softmax = softmax, .softmax_backward = softmax_backward, .rms_norm = rms_norm,                     \
    .rms_norm_backward = rms_norm_backward, .layer_norm = layer_norm, .layer_norm_backward =            \
    layer_norm_backward, .rope = rope, .swiglu = swiglu, .swiglu_backward = swiglu_backward, .embedding \
    = embedding, .embedding_backward = embedding_backward, .cross_entropy = cross_entropy,              \
    .cross_entropy_backward = cross_entropy_backward, .cross_entropy_gradient = cross_entropy_gradient, \
    .dropout = dropout, .square_sums = square_sums, .adam_step = adam_step, .sgd_step = sgd_step,       \
    .dequantize = dequantize, .peak = peak
