"""Training data: read by its keys, rendered with masks, packed, and drawn in an order that resumes."""

from entrenar.data.batch import Batch, Dataset, Rows, Windows, batches, build, pack
from entrenar.data.files import Source, find, hold_out, read, sha256
from entrenar.data.records import FORMATS, Record
from entrenar.data.render import IGNORE, Sample, render
from entrenar.data.sampler import Sampler
from entrenar.data.show import show

__all__ = [
    "FORMATS",
    "IGNORE",
    "Batch",
    "Dataset",
    "Record",
    "Rows",
    "Sample",
    "Sampler",
    "Source",
    "Windows",
    "batches",
    "build",
    "find",
    "hold_out",
    "pack",
    "read",
    "render",
    "sha256",
    "show",
]
