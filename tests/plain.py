"""The tutorial's modules in nothing but PyTorch, parameter for parameter the library's."""

import random

import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self, input_dim, emb_dim, hidden_dim, n_layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(input_dim, emb_dim)
        self.lstm = nn.LSTM(emb_dim, hidden_dim, n_layers, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src):
        outputs, (hidden, cell) = self.lstm(self.dropout(self.embedding(src)))
        return outputs, hidden, cell


class Attention(nn.Module):
    def __init__(self, hidden_dim):
        super().__init__()
        self.Wa = nn.Linear(hidden_dim, hidden_dim)
        self.Ua = nn.Linear(hidden_dim, hidden_dim)
        self.Va = nn.Linear(hidden_dim, 1)

    def forward(self, hidden, encoder_outputs, mask=None):
        energy = torch.tanh(self.Wa(hidden).unsqueeze(1) + self.Ua(encoder_outputs))
        scores = self.Va(energy).squeeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1)
        return torch.bmm(weights.unsqueeze(1), encoder_outputs), weights


class Decoder(nn.Module):
    def __init__(self, output_dim, emb_dim, hidden_dim, n_layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(output_dim, emb_dim)
        self.attention = Attention(hidden_dim)
        self.lstm = nn.LSTM(
            emb_dim + hidden_dim, hidden_dim, n_layers, dropout=dropout, batch_first=True
        )
        self.fc_out = nn.Linear(2 * hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input, hidden, cell, encoder_outputs, mask=None):
        embedded = self.dropout(self.embedding(input.unsqueeze(1)))
        context, _ = self.attention(hidden[-1], encoder_outputs, mask)
        output, (hidden, cell) = self.lstm(torch.cat([embedded, context], 2), (hidden, cell))
        logits = self.fc_out(torch.cat([output.squeeze(1), context.squeeze(1)], 1))
        return logits, hidden, cell


class Seq2Seq(nn.Module):
    def __init__(self, encoder, decoder, pad_idx=None):
        super().__init__()
        self.encoder, self.decoder, self.pad_idx = encoder, decoder, pad_idx

    def forward(self, src, trg, teacher_forcing_ratio=0.5):
        mask = None if self.pad_idx is None else src != self.pad_idx
        encoder_outputs, hidden, cell = self.encoder(src)
        B, T = trg.shape
        V = self.decoder.fc_out.out_features
        outputs = encoder_outputs.new_zeros(B, T, V)
        input = trg[:, 0]
        for t in range(1, T):
            logits, hidden, cell = self.decoder(input, hidden, cell, encoder_outputs, mask)
            outputs[:, t] = logits
            teacher_force = random.random() < teacher_forcing_ratio
            input = trg[:, t] if teacher_force else logits.argmax(1)
        return outputs


class Hoisted(Seq2Seq):
    """The same model, all steps forced, with what is no recurrence moved out of the loop by hand:
    keys, input gates and readout are one product each. A baseline of the benchmarks."""

    def forward(self, src, trg, teacher_forcing_ratio=1.0):
        assert teacher_forcing_ratio == 1.0
        mask = None if self.pad_idx is None else src != self.pad_idx
        values, hidden, cell = self.encoder(src)
        decoder, attention = self.decoder, self.decoder.attention
        embedded = decoder.dropout(decoder.embedding(trg[:, :-1].T))
        E, p = embedded.shape[2], decoder.dropout.p
        (w_input, w_hidden, *biases), *others = decoder.lstm.all_weights
        gates_of_inputs = nn.functional.linear(embedded, w_input[:, :E], sum(biases))
        weights = [torch.cat([w_input[:, E:], w_hidden], 1).T]
        weights += [torch.cat([w, u], 1).T for w, u, *_ in others]
        biases = [None] + [b + c for *_, b, c in others]
        keys, v = attention.Ua(values), attention.Va.weight[0]
        hidden, cell = list(hidden), list(cell)
        outputs, contexts = [], []
        for of_input in gates_of_inputs:
            query = attention.Wa(hidden[-1])
            scores = (torch.tanh(query.unsqueeze(1) + keys) * v).sum(-1)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            x = torch.bmm(scores.softmax(-1).unsqueeze(1), values).squeeze(1)
            contexts.append(x)
            for n, (w, b) in enumerate(zip(weights, biases, strict=True)):
                gates = torch.addmm(of_input if n == 0 else b, torch.cat([x, hidden[n]], 1), w)
                i, f, g, o = gates.chunk(4, 1)
                cell[n] = f.sigmoid() * cell[n] + i.sigmoid() * g.tanh()
                hidden[n] = o.sigmoid() * cell[n].tanh()
                x = nn.functional.dropout(hidden[n], p, self.training)
            outputs.append(hidden[-1])
        features = torch.cat([torch.stack(outputs, 1), torch.stack(contexts, 1)], 2)
        return nn.functional.pad(decoder.fc_out(features), (0, 0, 1, 0))


class OneLayerDecoder(nn.Module):
    """A decoder of one layer whose attention sees where it has attended before, as speech systems
    have it: the weights of the step before (ESPnet, SpeechBrain), and the sum of all before
    (Tacotron 2), or that alone (pointer-generator). Or, of this width, one that reads attentional
    vectors (JoeyNMT). Keys are projected once per source."""

    def __init__(
        self, V, E, H, D, A, location, filters, width, query_after, cell_type="lstm", vector=0
    ):
        super().__init__()
        self.embedding = nn.Embedding(V, E)
        self.attention = Attention(H)
        self.attention.Wa, self.attention.Ua = nn.Linear(H, A), nn.Linear(D, A)
        self.attention.Va = nn.Linear(A, 1)
        if location:
            self.attention.location_conv = nn.Conv1d(
                len(location), filters, width, padding=width // 2, bias=False
            )
            self.attention.location_dense = nn.Linear(filters, A, bias=False)
        if vector:
            self.attentional = nn.Linear(H + D, vector)
        self.cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell_type](E + (vector or D), H)
        self.fc_out = nn.Linear(vector or H + D, V)
        self.location, self.query_after, self.cell_type = location, query_after, cell_type

    def attend(self, hidden, keys, values, mask, place):
        a = self.attention
        if self.location:
            keys = keys + a.location_dense(a.location_conv(place).transpose(1, 2))
        scores = a.Va(torch.tanh(a.Wa(hidden).unsqueeze(1) + keys)).squeeze(2)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(1)
        context = torch.bmm(weights.unsqueeze(1), values).squeeze(1)
        if not self.location:
            return context, weights, place
        channels = zip(self.location, place.unbind(1), strict=True)
        place = [weights if name == "previous" else x + weights for name, x in channels]
        return context, weights, torch.stack(place, 1)

    def start(self, values):
        """The state before the first step: hidden, cell, context or vector, location."""
        B, S, _ = values.shape
        hidden = values.new_zeros(B, self.cell.hidden_size)
        place = values.new_zeros(B, len(self.location), S)
        fed = self.cell.input_size - self.embedding.embedding_dim
        return hidden, hidden, values.new_zeros(B, fed), place

    def step(self, token, state, keys, values, mask):
        hidden, cell, context, place = state
        if not self.query_after:
            context, weights, place = self.attend(hidden, keys, values, mask, place)
        x = torch.cat([self.embedding(token), context], 1)
        if self.cell_type == "lstm":
            hidden, cell = self.cell(x, (hidden, cell))
        else:
            hidden = self.cell(x, hidden)
        if self.query_after:
            context, weights, place = self.attend(hidden, keys, values, mask, place)
        features = torch.cat([hidden, context], 1)
        if hasattr(self, "attentional"):
            features = context = torch.tanh(self.attentional(features))
        return self.fc_out(features), (hidden, cell, context, place), weights

    def forward(self, tokens, values, mask):
        keys, state, logits = self.attention.Ua(values), self.start(values), []
        for token in tokens.unbind(1):
            found, state, _ = self.step(token, state, keys, values, mask)
            logits.append(found)
        return torch.stack(logits, 1)

    @torch.inference_mode()
    def greedy(self, values, mask, bos, steps):
        keys, state = self.attention.Ua(values), self.start(values)
        tokens = [torch.full((len(values),), bos, device=values.device)]
        for _ in range(steps):
            logits, state, _ = self.step(tokens[-1], state, keys, values, mask)
            tokens.append(logits.argmax(1))
        return torch.stack(tokens[1:], 1)

    def library_state_dict(self):
        """As `seq2seq_fast.Decoder` names it."""
        named = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0"}
        named |= {"bias_ih": "bias_ih_l0", "bias_hh": "bias_hh_l0"}
        return {
            f"{self.cell_type}.{named[n[5:]]}" if n.startswith("cell.") else n: x
            for n, x in self.state_dict().items()
        }
