"""Files: GGUF, safetensors, Hugging Face directories and training checkpoints, strictly read and
atomically written.

Modules: gguf_read, gguf_write, safetensors, checkpoint, describe (what `entrenar inspect` shows), files
(shared ways to the disk). Which tensor means what is not decided here but in `entrenar.models.arch`.
"""
