"""BioMerge: generative biomedical NER with LoRA-tuned language models, as notebooks over a thin library."""

__version__ = "0.1.0"
