/* Every kernel, compiled with the words of the file that includes this, and the table of them. A level that has a
 * better way for one kernel names it after EN_KERNELS in its own table. */
#include "../entrenar.h"

#include "vmath.h"

#include "gemm.h"

#define EN_KERNELS .gemm = gemm
