"""A tokenizer that needs no download: one word, one token."""

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tiny_tokenizer(vocab_size: int = 64) -> PreTrainedTokenizerFast:
    """Split at blanks; the words are ``w0`` to ``w<vocab_size - 1>``, everything else is ``w0``."""
    words = {f"w{index}": index for index in range(vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown, begin, end = (AddedToken(f"w{index}", single_word=True) for index in range(3))  # not the w1 of w10
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=unknown, pad_token=unknown, bos_token=begin, eos_token=end
    )
