"""A tokenizer with BOS, which begins every text with it as those of Gemma and Llama do, or adds none."""

from pathlib import Path

from tokenizers import processors

from lit_prune.models.load import load_tokenizer


def with_bos(folder: Path, adds: bool = True) -> tuple[str, int]:
    """Saves the embedded model's tokenizer with a BOS of its own; returns where, and the id of BOS."""
    tokenizer = load_tokenizer("embedded")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer.bos_token_id
