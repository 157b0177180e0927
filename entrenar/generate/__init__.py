"""Continuing a prompt: the sampler and the loop around the model's next-token logits."""

from entrenar.generate.run import Generation, GenerationStream, generate
from entrenar.generate.sample import SamplingConfig

__all__ = ["Generation", "GenerationStream", "SamplingConfig", "generate"]
