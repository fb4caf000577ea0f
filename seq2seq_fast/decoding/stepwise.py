"""Decoding step by step in plain PyTorch: what the compiled engine is held to, and what decodes
where that one does not."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from . import sampling
from .options import DecodingOptions
from .results import Generated

if TYPE_CHECKING:
    from ..nn.attention import PreparedSource
    from ..nn.decoder import Decoder, DecoderState

    Source: TypeAlias = Tensor | PreparedSource


def generate(
    decoder: "Decoder", source: "Source", state: "DecoderState", options: DecodingOptions
) -> Generated:
    """See `seq2seq_fast.generate`; arguments are checked already."""
    decode = beam_search if options.beam_size > 1 else one_each
    return decode(decoder, source, state, options)


def take_source(source: "Source", rows: Tensor) -> "Source":
    """The sources of some rows."""
    if isinstance(source, Tensor):
        return source[rows]
    keys, powers = source.keys
    return source._replace(
        keys=type(source.keys)(
            keys[rows], powers[rows] if powers is not None and len(powers) else powers
        ),
        values=source.values[rows],
        mask=None if source.mask is None else source.mask[rows],
    )


def take_state(state: "DecoderState", rows: Tensor) -> "DecoderState":
    """The states of some rows."""
    return type(state)(
        state.hidden[:, rows],
        None if state.cell is None else state.cell[:, rows],
        None if state.context is None else state.context[rows],
        None if state.location is None else state.location[rows],
    )


def repeated(
    source: "Source", state: "DecoderState", options: DecodingOptions
) -> tuple["Source", "DecoderState", DecodingOptions]:
    """Each source n_samples times, side by side, to be drawn for once."""
    B, n = state.hidden.shape[1], options.n_samples
    rows = torch.arange(B, device=state.hidden.device).repeat_interleave(n)
    bos, prefix = options.bos, options.prefix
    options = replace(
        options,
        n_samples=1,
        bos=bos.repeat_interleave(n) if isinstance(bos, Tensor) else bos,
        prefix=None if prefix is None else prefix.expand(B, -1).repeat_interleave(n, 0),
    )
    return take_source(source, rows), take_state(state, rows), options


def attended(source: "Source") -> Tensor | None:
    """(B, S) bool: which positions may be attended to; None without attention."""
    if isinstance(source, Tensor):
        return None
    if source.mask is not None:
        return source.mask
    return source.values.new_ones(source.values.shape[:2], dtype=torch.bool)


def row_limits(source: "Source", options: DecodingOptions, batch: int) -> Tensor:
    """The most tokens of each row (B,)."""
    if options.max_length_ratio is None:  # a prefix is no longer than max_length
        return torch.full((batch,), options.max_length, device="cpu")
    positions = attended(source)
    assert positions is not None  # lengths relative to nothing have been refused
    return options.limits(positions.sum(1))


def forced(options: DecodingOptions, batch: int, device: torch.device) -> Tensor:
    """The prefix of each row (B, P)."""
    if options.prefix is None:
        return torch.empty(batch, 0, dtype=torch.int64, device=device)
    return options.prefix.to(device, torch.int64).expand(batch, -1)


def begun(options: DecodingOptions, batch: int, device: torch.device) -> Tensor:
    """The token that is fed first to each row (B,)."""
    of_rows = options.bos_of_rows(device)
    return torch.full((batch,), options.whole[0], device=device) if of_rows is None else of_rows


def penalised(
    log_probs: Tensor, lengths: Tensor, weights: Tensor | None, positions: Tensor | None, options
) -> Tensor:
    """log P / lp + cp of hypotheses (N,) with weights (N, n, S) and positions (N, S)."""
    scores = log_probs / ((5 + lengths.double()) / 6) ** options.length_penalty
    if options.coverage_penalty > 0:
        assert weights is not None and positions is not None
        covered = weights.sum(1).clamp(torch.finfo(torch.float32).tiny, 1).double()
        covered = covered.log().masked_fill(~positions, 0).sum(1)
        scores = scores + options.coverage_penalty * covered
    return scores


def bar(logits: Tensor, history: Tensor, options: DecodingOptions) -> Tensor:
    """logits (N, V) with -inf for what must not follow on history (N, t)."""
    t, n = history.shape[1], options.no_repeat_ngram
    barred = logits.clone()
    if t + 1 < options.min_length:
        barred[:, options.eos] = -torch.inf
    if n and t >= n:
        grams = history.unfold(1, n, 1)
        again = (grams[..., :-1] == history[:, None, t - n + 1 :]).all(-1)
        rows, at = again.nonzero(as_tuple=True)
        barred[rows, grams[rows, at, -1]] = -torch.inf
    stuck = barred.isneginf().all(1)
    barred[stuck, options.eos] = logits[stuck, options.eos]
    return barred


def one_each(
    decoder: "Decoder", source: "Source", state: "DecoderState", options: DecodingOptions
) -> Generated:
    """Greedy decoding and sampling: one hypothesis of each row."""
    B, device = state.hidden.shape[1], state.hidden.device
    limits, prefix = row_limits(source, options, B).to(device), forced(options, B, device)
    positions, T = attended(source), int(limits.max())
    tokens = torch.full((B, T), options.fill, device=device)
    lengths = torch.zeros(B, dtype=torch.int64, device=device)
    log_probs = torch.zeros(B, dtype=torch.float64, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    weights = None
    if positions is not None and (options.return_weights or options.coverage_penalty > 0):
        weights = state.hidden.new_zeros(B, T, positions.shape[1])
    live = torch.arange(B, device=device)  # rows that have not ended
    seed = sampling.seed_of(options, device) if options.sample else None
    token = begun(options, B, device)
    for t in range(T):
        logits, state, w = decoder.step(token, state, source)
        log_p = logits.log_softmax(-1).double()
        if t < prefix.shape[1]:
            token = prefix[live, t]
        else:
            allowed = bar(logits, tokens[live, :t], options)
            if seed is None:
                token = allowed.argmax(1)
            else:
                noise = sampling.gumbel(seed, live, t, allowed.shape[1])
                token = sampling.draw(allowed, noise, options)
            nothing_left = allowed.gather(1, token[:, None]).squeeze(1).isneginf()
            token = token.masked_fill(nothing_left, options.eos)
        tokens[live, t] = token
        lengths[live] = t + 1
        log_probs[live] += log_p.gather(1, token[:, None]).squeeze(1)
        finished[live] = token == options.eos
        if weights is not None and w is not None:
            weights[live, t] = w
        goes_on = (~finished[live] & (limits[live] > t + 1)).nonzero().squeeze(1)
        if len(goes_on) == 0:
            break
        if len(goes_on) < len(live):
            live, token = live[goes_on], token[goes_on]
            state, source = take_state(state, goes_on), take_source(source, goes_on)
    n = int(lengths.max())
    scores = penalised(log_probs, lengths, weights, positions, options)
    return Generated(
        tokens[:, :n],
        lengths,
        log_probs.float(),
        scores.float(),
        finished,
        weights[:, :n] if weights is not None and options.return_weights else None,
    )


@dataclass
class Hypothesis:
    tokens: Tensor  # (t,)
    log_prob: float
    score: float
    finished: bool
    weights: Tensor | None  # (t, S)


class Beams:
    """The live hypotheses of R rows, K places each; a place whose log_prob is -inf is empty."""

    def __init__(self, B: int, K: int, S: int | None, state: "DecoderState"):
        like = state.hidden
        self.rows = torch.arange(B, device=like.device)  # of the batch, (R,)
        self.tokens = torch.empty(B, K, 0, dtype=torch.int64, device=like.device)
        self.log_probs = torch.full((B, K), -torch.inf, dtype=torch.float64, device=like.device)
        self.log_probs[:, 0] = 0
        self.weights = None if S is None else like.new_empty(B, K, 0, S)
        self.state = take_state(state, self.rows.repeat_interleave(K))

    def follow(self, parents: Tensor, tokens: Tensor, log_probs: Tensor) -> None:
        """Each place becomes its parent's (R, K) and one token."""
        R, K = parents.shape
        at = torch.arange(R, device=parents.device)[:, None]
        self.tokens = torch.cat([self.tokens[at, parents], tokens[..., None]], 2)
        self.log_probs = log_probs
        if self.weights is not None:
            self.weights = self.weights[at, parents]
        self.state = take_state(self.state, (at * K + parents).flatten())

    def attended(self, weights: Tensor | None) -> None:
        """Adds a step's weights (R * K, S), if weights are kept."""
        if self.weights is not None and weights is not None:
            step = weights.view(*self.weights.shape[:2], 1, -1)
            self.weights = torch.cat([self.weights, step], 2)

    def keep(self, rows: Tensor) -> None:
        K = self.log_probs.shape[1]
        self.rows, self.tokens, self.log_probs = (
            x[rows] for x in (self.rows, self.tokens, self.log_probs)
        )
        if self.weights is not None:
            self.weights = self.weights[rows]
        places = rows[:, None] * K + torch.arange(K, device=rows.device)
        self.state = take_state(self.state, places.flatten())


class Ended:
    """The n_best hypotheses of one row that have ended, the best one first."""

    def __init__(self, options: DecodingOptions, positions: Tensor | None):
        self.options, self.positions = options, positions
        self.best: list[Hypothesis] = []

    def add(self, tokens: Tensor, log_prob: Tensor, weights: Tensor | None, finished: bool) -> None:
        """Among equals those that were there come first, and finished ones before all others."""
        score = penalised(
            log_prob[None],
            torch.tensor([len(tokens)], device=tokens.device),
            None if weights is None else weights[None],
            None if self.positions is None else self.positions[None],
            self.options,
        )
        new = Hypothesis(tokens, float(log_prob), float(score), finished, weights)
        self.best.append(new)
        self.best.sort(key=lambda h: (h.finished, h.score), reverse=True)  # stable
        del self.best[self.options.n_best :]

    def complete(self, log_prob: float, limit: int) -> bool:
        """Whether no continuation of a hypothesis with this log_prob can come among the best: log
        P only falls, lp is largest at the greatest length, cp is at most 0."""
        if len(self.best) < self.options.n_best or not self.best[-1].finished:
            return False
        length = torch.tensor((5 + limit) / 6, dtype=torch.float64)  # whose power may be infinite
        return self.best[-1].score >= float(log_prob / length**self.options.length_penalty)


def beam_search(
    decoder: "Decoder", source: "Source", state: "DecoderState", options: DecodingOptions
) -> Generated:
    """Beam search, as `DecodingOptions` tells it."""
    B, K, device = state.hidden.shape[1], options.beam_size, state.hidden.device
    limits, prefix = row_limits(source, options, B).to(device), forced(options, B, device)
    positions = attended(source)
    keep_weights = options.return_weights or options.coverage_penalty > 0
    S = positions.shape[1] if positions is not None and keep_weights else None
    ended = [Ended(options, None if positions is None else positions[b]) for b in range(B)]
    beams = Beams(B, K, S, state)
    token = begun(options, B, device).repeat_interleave(K)
    for t in range(int(limits.max())):
        R = len(beams.rows)
        expanded = take_source(source, beams.rows.repeat_interleave(K))
        logits, beams.state, w = decoder.step(token, beams.state, expanded)
        log_p = logits.log_softmax(-1).double()
        beams.attended(w)
        if t < prefix.shape[1]:
            token = prefix[beams.rows, t, None].expand(R, K)
            log_p = log_p.view(R, K, -1).gather(2, token[..., None]).squeeze(2)
            parents = torch.arange(K, device=device).expand(R, K)
            beams.follow(parents, token, beams.log_probs + log_p)
        else:
            allowed = bar(log_p, beams.tokens.flatten(0, 1), options).view(R, K, -1)
            _continue(beams, ended, beams.log_probs[..., None] + allowed, options)
        going = []
        for i, b in enumerate(beams.rows.tolist()):
            best, limit = float(beams.log_probs[i, 0]), int(limits[b])
            if t + 1 == limit:
                _end_all(beams, i, ended[b])
            elif best > -torch.inf and not ended[b].complete(best, limit):
                going.append(i)
        if not going:
            break
        if len(going) < R:
            beams.keep(torch.tensor(going, device=device))
        token = beams.tokens[:, :, -1].flatten()
    return _assemble([e.best for e in ended], options, state.hidden, S)


def _continue(beams: Beams, ended: list[Ended], scores: Tensor, options: DecodingOptions) -> None:
    """Every row goes on with the best of its continuations, of log-probabilities (R, K, V)."""
    R, K, V = scores.shape
    # Beside K continuations there are at most K with eos. Of equals the first one comes first.
    best, index = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    best, index = best[:, : 2 * K], index[:, : 2 * K]
    parents, tokens = index // V, index % V
    ends = tokens == options.eos
    for i, rank in (ends[:, :K] & (best[:, :K] > -torch.inf)).nonzero().tolist():
        parent = parents[i, rank]
        ended[int(beams.rows[i])].add(
            torch.cat([beams.tokens[i, parent], tokens[i, rank, None]]),
            best[i, rank],
            None if beams.weights is None else beams.weights[i, parent],
            True,
        )
    on = ends.long().sort(dim=1, stable=True).indices[:, :K]  # the first K without eos
    best = best.masked_fill(ends, -torch.inf).gather(1, on)
    beams.follow(parents.gather(1, on), tokens.gather(1, on), best)


def _end_all(beams: Beams, i: int, ended: Ended) -> None:
    """What a row's live hypotheses are when there is no more room for them."""
    for place, log_prob in enumerate(beams.log_probs[i]):
        if log_prob > -torch.inf:
            weights = None if beams.weights is None else beams.weights[i, place]
            ended.add(beams.tokens[i, place], log_prob, weights, False)


def _assemble(
    rows: list[list[Hypothesis]], options: DecodingOptions, like: Tensor, S: int | None
) -> Generated:
    B, N, device = len(rows), options.n_best, like.device
    n = max((len(h.tokens) for row in rows for h in row), default=0)
    tokens = torch.full((B, N, n), options.fill, device=device)
    lengths = torch.zeros(B, N, dtype=torch.int64, device=device)
    log_probs = torch.full((B, N), -torch.inf, device=device)
    scores, finished = log_probs.clone(), torch.zeros(B, N, dtype=torch.bool, device=device)
    weights = like.new_zeros(B, N, n, S) if S is not None and options.return_weights else None
    for b, row in enumerate(rows):
        for i, h in enumerate(row):
            tokens[b, i, : len(h.tokens)] = h.tokens
            lengths[b, i], finished[b, i] = len(h.tokens), h.finished
            log_probs[b, i], scores[b, i] = h.log_prob, h.score
            if weights is not None and h.weights is not None:
                weights[b, i, : len(h.tokens)] = h.weights
    return Generated(tokens, lengths, log_probs, scores, finished, weights)
