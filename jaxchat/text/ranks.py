"""A tokenizer from tiktoken's ranks: every token's bytes in the order in which they were merged."""

from __future__ import annotations

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from jaxchat.text.tokenizer import byte_alphabet

Ranks = dict[bytes, int]


def from_ranks(ranks: Ranks, pattern: str) -> Tokenizer:
    """Byte-level BPE that encodes as tiktoken does, words cut by `pattern`; without special tokens.

    tiktoken merges the pair whose bytes have the lowest rank, so a token's two halves are what its own bytes come to
    with lower ranks; and it takes a whole word that is a token without merging (`ignore_merges`). Raises what the
    library raises for a pattern or ranks that cannot be.
    """
    printable = {byte: character for character, byte in byte_alphabet().items()}

    def shown(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        halves = _merged(token, ranks, rank)
        if len(token) > 1 and len(halves) == 2:
            merges.append((shown(halves[0]), shown(halves[1])))
    vocab = {shown(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merged(token: bytes, ranks: Ranks, below: int) -> list[bytes]:
    """What byte-pair merging with the ranks below makes of a token's bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        pairs = [(ranks.get(a + b, below), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs, default=(below, 0))
        if rank >= below:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
