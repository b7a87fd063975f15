import torch


def tokenize(texts, context_length=77 * 4 - 60, truncate=False):
    """The lengths of words, padded with zeros."""
    result = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in enumerate(texts):
        lengths = [len(word) for word in text.split()]
        if len(lengths) > context_length and not truncate:
            raise RuntimeError(f"Input {text} is too long for context length {context_length}")
        result[row, : len(lengths)] = torch.tensor(lengths, dtype=torch.int)[:context_length]
    return result
