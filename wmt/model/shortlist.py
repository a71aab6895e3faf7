"""A shortlist: the few words of the vocabulary that a batch's translations are made of.

The softmax and the search then look at those instead of all words, as in Jean et al. (2015, section
3.2.2) and Marian: a direction's most frequent words, and for each source piece those that translate
it most often, see `taskmoe.wmt.text.lexicon`. Probabilities are those among these words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from taskmoe.cli.command_line import write_bytes
from taskmoe.cli.errors import InputError
from taskmoe.wmt.model.transformer import Params, with_softmax
from taskmoe.wmt.text.lexicon import NOTHING, learn_lexicon
from taskmoe.wmt.text.tokenizer import EOS, Tokenizer

#: Words are a multiple, so that few shapes are compiled.
MULTIPLE = 512
#: What numpy raises of a file that is damaged or another's.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError),
    *(zlib.error, zipfile.BadZipFile),
)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Of one direction. first: ids of its most frequent words, which are always looked at.

    starts [V + 1] and words: those of source piece i are `words[starts[i] : starts[i + 1]]`, the
    likeliest first, and the piece itself, for what is copied.
    """

    first: np.ndarray
    starts: np.ndarray
    words: np.ndarray

    def of(self, piece: int) -> np.ndarray:
        """The words of a source piece."""
        return self.words[self.starts[piece] : self.starts[piece + 1]]


@dataclasses.dataclass(frozen=True, eq=False)
class Shortlist:
    """Candidates of each direction.

    vocabulary: SHA-256 of the one that ids are of. size: its number of pieces.
    """

    candidates: dict[str, Candidates]
    vocabulary: str
    size: int

    def words(self, pairs: Sequence[str], source: np.ndarray) -> np.ndarray | None:
        """Sorted ids [N] i32 for a batch of sources [B, S], each in its direction.

        The special ones 0 to 3 are the first four. N is a multiple of `MULTIPLE`, filled up with
        the first words of the vocabulary; None where that would be all of it. Raises InputError for
        a direction that the shortlist lacks.
        """
        wanted = np.zeros(self.size, bool)
        wanted[: EOS + 1] = True
        for pair in dict.fromkeys(pairs):
            own = self.of(pair)
            wanted[own.first] = True
            for piece in np.unique(source[[p == pair for p in pairs]]):
                wanted[own.of(piece)] = True
        count = -(-int(wanted.sum()) // MULTIPLE) * MULTIPLE
        if count >= self.size:
            return None
        wanted[np.flatnonzero(~wanted)[: count - int(wanted.sum())]] = True
        return np.flatnonzero(wanted).astype(np.int32)

    def of(self, pair: str) -> Candidates:
        """A direction's candidates; raises InputError where the shortlist lacks it."""
        if pair not in self.candidates:
            raise InputError(
                f"the shortlist has no direction {pair}, only {', '.join(self.candidates)}"
            )
        return self.candidates[pair]

    def digest(self) -> str:
        """SHA-256 of all that it holds, hexadecimal."""
        found = hashlib.sha256(self.vocabulary.encode())
        for pair, own in sorted(self.candidates.items()):
            found.update(pair.encode())
            for array in (own.first, own.starts, own.words):
                found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        arrays = {
            f"{pair}/{name}": array
            for pair, own in self.candidates.items()
            for name, array in dataclasses.asdict(own).items()
        }
        file = io.BytesIO()
        np.savez_compressed(file, vocabulary=self.vocabulary, size=self.size, **arrays)
        write_bytes(path, file.getvalue())

    @classmethod
    def load(cls, path: Path, tokenizer: Tokenizer) -> Shortlist:
        """Read a file; raises InputError where it is none, or one of another vocabulary."""
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            vocabulary, size = str(arrays.pop("vocabulary")), int(arrays.pop("size"))
            fields: dict[str, dict[str, np.ndarray]] = {}
            for name, array in arrays.items():
                pair, _, field = name.rpartition("/")
                fields.setdefault(pair, {})[field] = array
            found = {pair: Candidates(**own) for pair, own in fields.items()}
        except _UNREADABLE as error:
            raise InputError(f"--shortlist {path} is no shortlist: {error}") from None
        if vocabulary != _digest(tokenizer):
            raise InputError(f"--shortlist {path} is of another vocabulary than the model's")
        return cls(found, vocabulary, size)


def learn_candidates(
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    size: int,
    *,
    first: int = 100,
    best: int = 100,
) -> Candidates:
    """Candidates of a direction from encoded sentence pairs; size: of the vocabulary.

    first: how many words are always looked at. best: of each source piece. Raises ValueError where
    a number is negative or no target has a piece.
    """
    for name, value in (("first", first), ("best", best)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    lexicon = learn_lexicon(source, target)
    seen = np.bincount(np.concatenate([np.array(t, np.int64) for t in target]), minlength=size)
    order = np.lexsort((lexicon.target, -lexicon.probability, lexicon.source))
    cause, words = lexicon.source[order], lexicon.target[order]
    begins = np.searchsorted(cause, np.arange(size + 1))
    rank = np.arange(len(cause)) - begins[cause]
    kept = rank < best
    cause, words = cause[kept], words[kept]
    pieces = np.arange(EOS + 1, size)  # each translates itself too
    cause, words = np.concatenate([cause, pieces]), np.concatenate([words, pieces])
    order = np.argsort(cause, kind="stable")
    often = np.argsort(-seen, kind="stable")[:first]
    always = np.union1d(often[seen[often] > 0], words[cause == NOTHING])
    starts = np.searchsorted(cause[order], np.arange(size + 1))
    return Candidates(
        always.astype(np.int32), starts.astype(np.int64), words[order].astype(np.int32)
    )


def shortlist_of(candidates: dict[str, Candidates], tokenizer: Tokenizer) -> Shortlist:
    """A shortlist for models of this vocabulary."""
    return Shortlist(candidates, _digest(tokenizer), tokenizer.vocab_size)


@jax.jit
def narrowed(params: Params, words: jax.Array) -> Params:
    """Parameters of a model whose target words are these ids [N] alone, in their order."""
    params = with_softmax(params)
    table = params.get("target_embedding", params["embedding"])
    columns: Any = jax.tree.map(lambda w: jnp.take(w, words, axis=-1), params["softmax"])
    rows = jax.tree.map(lambda w: w[words], table)
    return params | {"target_embedding": rows, "softmax": columns}


def _digest(tokenizer: Tokenizer) -> str:
    return hashlib.sha256(tokenizer.model).hexdigest()
