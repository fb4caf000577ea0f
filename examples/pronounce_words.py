"""Pronounces words with a model that examples/pronounce.py saved.

    python examples/pronounce_words.py MODEL WORD ... [--beam K] [--attention FOLDER]
    python examples/pronounce_words.py MODEL < words.txt > pronounced.txt

Prints a line as soon as its word is done: the word, a tab, its phonemes; with --n-best more lines,
the likeliest first, and --scores adds a column of log-probabilities. While it reads standard input
it says on standard error how far it is. What is not a word of letters is left out, with a warning.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from pronounce import (
    EOS,
    LONGEST,
    PAD,
    PHONEMES,
    SOS,
    at_least,
    build,
    draw_attention,
    saved,
    spelled,
)

import seq2seq_fast as s2s


def load(path: Path, dtype: str) -> s2s.Seq2Seq:
    checkpoint = saved(path)
    model = build(checkpoint["hidden"], pack_padded=True).eval()  # words of any lengths together
    model.load_state_dict(checkpoint["model"])
    return model.prepare_inference(dtype)


Lines = list[tuple[str, float]]  # phonemes and their log-probability, the likeliest first


def pronounced(
    model: s2s.Seq2Seq, words: Iterable[list[str]], batch_size: int, beam: int, n_best: int
) -> Iterator[tuple[str, Lines]]:
    """Each word with its pronunciations, in the order they came in, a batch at a time of those that
    came together."""
    for batch in (w[i : i + batch_size] for w in words for i in range(0, len(w), batch_size)):
        found: dict[str, Lines] = {}
        each = list(dict.fromkeys(word.lower() for word in batch))
        out = model.generate(
            spelled(each, "cpu"), bos=SOS, eos=EOS, pad_idx=PAD, max_length=LONGEST,
            beam_size=beam, n_best=n_best,
        )  # fmt: skip
        shape = (len(each), n_best, -1)
        tokens, log_probs = out.tokens.view(shape).tolist(), out.log_probs.view(shape[:2])
        for word, rows, row_log_probs in zip(each, tokens, log_probs.tolist(), strict=True):
            said = [" ".join(PHONEMES[i] for i in row if i not in (PAD, SOS, EOS)) for row in rows]
            found[word] = list(zip(said, row_log_probs, strict=True))
        for word in batch:
            yield word, found[word.lower()]


def arrived(stream: TextIO) -> Iterator[list[str]]:
    """A stream's lines, those together that are there already, so that none waits for others."""
    raw = getattr(stream, "buffer", None)
    if raw is None:
        yield stream.read().splitlines()
        return
    rest = b""
    while chunk := raw.read1(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        yield [line.decode(errors="replace") for line in lines]  # no text is no word either
    yield [rest.decode(errors="replace")]


def letters_only(words: Iterable[str]) -> list[str]:
    kept = []
    for word in map(str.strip, words):
        if word.isascii() and word.isalpha():
            kept.append(word)
        elif word:
            print(f"left out, not a word of letters: {word!r}", file=sys.stderr)
    return kept


def told(done: Iterable[tuple[str, Lines]]) -> Iterator[tuple[str, Lines]]:
    """Passes `done` on and says how many there were: at the end, and on a terminal twice a second,
    in a line that gives way to what is printed next."""
    start = last = time.perf_counter()
    n, shown = 0, False
    for n, item in enumerate(done, 1):
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        yield item
        now = time.perf_counter()
        shown = now - last > 0.5 and sys.stderr.isatty()
        if shown:
            last = now
            rate = n / (now - start)
            print(f"{n} words, {rate:.0f} words/s", end="", file=sys.stderr, flush=True)
    rate = n / max(time.perf_counter() - start, 1e-9)
    print(f"{n} words, {rate:.0f} words/s", file=sys.stderr)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Pronounces words, of the arguments or of standard input.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="a checkpoint of examples/pronounce.py --save")
    add("words", nargs="*", help="without any, standard input is read, a word a line")
    add("--beam", type=int, default=1, help="beam size; 1 is greedy")
    add("--n-best", type=int, default=1, help="pronunciations of each word, at most --beam")
    add("--scores", action="store_true", help="a third column: log-probability")
    add("--batch-size", type=int, default=256, help="words decoded together")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "int8"], help="of weights")
    add("--attention", type=Path, help="draw each argument's attention into this folder")
    args = parser.parse_args(argv)
    at_least(parser, args, batch_size=1)
    if not 1 <= args.beam <= len(PHONEMES):
        parser.error(f"--beam: got {args.beam}, expected 1 to {len(PHONEMES)}")
    if args.attention and not args.words:
        parser.error("--attention: got words of standard input, expected them as arguments")
    if not 1 <= args.n_best <= args.beam:
        parser.error(f"--n-best: got {args.n_best}, expected 1 to {args.beam}, the beam size")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    model = load(args.model, args.dtype)
    words = map(letters_only, [args.words] if args.words else arrived(sys.stdin))
    found = pronounced(model, words, args.batch_size, args.beam, args.n_best)
    for word, lines in found if args.words else told(found):
        for said, log_prob in lines:
            print(word, said, *[f"{log_prob:.3f}"] * args.scores, sep="\t", flush=True)
    if args.attention:
        args.attention.mkdir(parents=True, exist_ok=True)
        for word in letters_only(args.words):
            path = args.attention / f"{word.lower()}.png"
            draw_attention(model, word.lower(), "cpu", path)
            print(f"Attention plot: {path}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head` has read enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
