"""Hugging Face weights on timm and open_clip modules, so that running a model needs no transformers."""
