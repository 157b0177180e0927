"""`entrenar quickstart`: the main job, fine-tuning, on a tiny model and data that come with the package.

`world` generates all text, `recipe` makes the base model from it, `story` is the run, `page` what the terminal shows.
"""
