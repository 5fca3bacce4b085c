"""Text from a model, for a person to look at."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return what a causal language model says after a prompt, taking the likeliest token each time."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
