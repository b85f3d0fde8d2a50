"""The engine "kvcache": generation in plain torch. It is the reference for vLLM in tests, and runs where vLLM cannot.

Shape letters   B sequences | Q new tokens of each | K cached tokens | H query heads and G key/value heads of this rank
                D head_dim
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf.contracts import Completion, Engine, Request, Sampling
from rlhf.model.architecture import Architecture
from rlhf.model.rope import Rope, rotate
from rlhf.parallel.layout import Place
from rlhf.weights import names

BATCH = 2**15  # largest number of tokens in the KV cache; more requests run as several batches


class Batch:
    """Requests that run together, with space for `length` tokens in the KV cache each.

    A completed request keeps its row in the batch until all requests are complete.
    """

    def __init__(self, model: KVCache, requests: list[Request], length: int):
        self.model, self.requests, self.length = model, requests, length
        self.sampling, device, prompts = requests[0].sampling, model.device, [request.prompt for request in requests]
        self.sizes = torch.tensor([len(p) for p in prompts], device=device)
        most = [request.sampling.max_tokens for request in requests]
        self.room = torch.minimum(model.max_len - self.sizes, torch.tensor(most, device=device))
        # No query attends to the padding on the right. A generated token overwrites it before a query has its position.
        width = int(self.sizes.max())
        self.tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
        self.positions = torch.arange(width, device=device).expand_as(self.tokens)
        shape = (model.arch.layers, 2, len(prompts), length, model.kv_heads, model.arch.head_dim)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=device)
        # All random numbers are drawn before generation starts, so they do not depend on the batch or its order.
        draws = [
            torch.rand(count, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)
            for count, request in zip(most, requests, strict=True)
        ]
        self.draw = pad_sequence(draws).to(device)  # [largest max_tokens, B]
        self.stop = torch.tensor(self.sampling.stop_ids, dtype=torch.int64, device=device)
        # indices of the hidden states that predict the next tokens
        self.rows, self.last = torch.arange(len(prompts), device=device), self.sizes - 1
        self.done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        self.drawn = [Completion([], [], "length") for _ in requests]
        self.steps = 0

    def step(self) -> list[tuple[int, Completion]]:
        """Sample one token for each request that is not complete. Return newly completed ones, as (key, completion)."""
        hidden = self.model.forward(self.tokens, self.positions, self.cache)
        token, logp = choose(self.model.logits(hidden[self.rows, self.last]), self.sampling, self.draw[self.steps])
        stopped = torch.isin(token, self.stop)
        ending = stopped | (self.steps + 1 >= self.room)
        found = []
        columns = zip(*(x.tolist() for x in (self.done, token, logp, stopped, ending)), strict=True)
        for i, (done, drawn, value, is_stop, is_end) in enumerate(columns):
            if done:
                continue
            request, completion = self.requests[i], self.drawn[i]
            completion.tokens.append(drawn)
            completion.logp.append(value)
            if is_stop or (request.ends and request.ends(completion.tokens)):
                completion.finish = "stop"
            if is_end or completion.finish == "stop":
                self.done[i] = True
                found.append((request.key, completion))
        self.tokens, self.last = token[:, None], torch.zeros_like(self.sizes)
        # A completed request may reach the end of its cache. It then stays at the last position.
        self.positions = (self.sizes + self.steps).clamp(max=self.length - 1)[:, None]
        self.steps += 1
        return found

    def held(self) -> list[tuple[int, Completion]]:
        """Return the tokens so far of the requests that are not complete, as (key, completion)."""
        rows = zip(self.requests, self.drawn, self.done.tolist(), strict=True)
        return [
            (request.key, Completion(drawn.tokens, drawn.logp, "held")) for request, drawn, done in rows if not done
        ]


class KVCache(Engine):
    """A dense decoder with a preallocated KV cache. Its parameters have vLLM's fused names.

    max_len is the largest number of tokens of prompt and response together. The ranks of `group` (None if tp is 1) are
    tensor parallel. They make the same calls and gather the same logits, so they sample the same tokens.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        tp: int,
        tp_rank: int,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device | str,
        max_len: int,
    ):
        assert arch.heads % tp == 0, f"tp {tp} does not divide {arch.heads} heads"
        assert arch.kv_heads % tp == 0 or tp % arch.kv_heads == 0, (
            f"tp {tp} neither divides nor repeats {arch.kv_heads} kv heads"
        )
        self.arch, self.tp, self.tp_rank, self.group = arch, tp, tp_rank, group
        self.dtype, self.device, self.max_len = dtype, device, max_len
        self.heads, self.kv_heads = arch.heads // tp, max(1, arch.kv_heads // tp)
        self.rope = Rope.of(arch, device)
        self.waiting: list[Request] = []
        self.running: Batch | None = None
        shapes = names.parameters(arch, "vllm", Place((tp_rank, tp)))
        self.weights = {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()}

    def submit(self, requests: list[Request]) -> None:
        """Add requests to the end of the queue.

        Log-probs are those of the sampled distribution, after temperature, top-k and top-p. With temperature=0 they are
        those of the distribution at temperature 1.
        """
        for request in requests:
            assert 0 < len(request.prompt) < self.max_len, (
                f"a prompt is empty or leaves no room in {self.max_len} tokens"
            )
        self.waiting += requests

    @torch.no_grad()
    def advance(self) -> list[tuple[int, Completion]]:
        """Sample one token for each running request, as in Engine.

        The requests of a batch have the same sampling parameters, except max_tokens, and similar lengths. A batch
        begins when all requests of the previous one are complete.
        """
        if not self.running and self.waiting:
            self.waiting.sort(key=lambda request: len(request.prompt))  # prompts of similar length need less padding
            kinds = [replace(request.sampling, max_tokens=0) for request in self.waiting]
            alike = [request for request, kind in zip(self.waiting, kinds, strict=True) if kind == kinds[-1]]
            length = min(max(len(request.prompt) + request.sampling.max_tokens for request in alike), self.max_len)
            batch = alike[-max(1, BATCH // length) :]
            chosen = {request.key for request in batch}
            self.waiting = [request for request in self.waiting if request.key not in chosen]
            self.running = Batch(self, batch, length)
        if not self.running:
            return []
        found = self.running.step()
        if self.running.done.all():
            self.running = None
        return found

    def withdraw(self) -> list[tuple[int, Completion]]:
        held = self.running.held() if self.running else []
        held += [(request.key, Completion([], [], "held")) for request in self.waiting]
        self.running, self.waiting = None, []
        return held

    def parameters(self) -> dict[str, Tensor]:
        return self.weights

    def sleep(self) -> None:
        for weight in self.weights.values():  # there is no KV cache, because it belongs to the running batch
            weight.untyped_storage().resize_(0)

    def wake_weights(self) -> None:
        for weight in self.weights.values():
            if not weight.untyped_storage().nbytes():
                weight.untyped_storage().resize_(weight.nbytes)
                weight.zero_()  # a publish does not write the rows that pad the vocabulary

    def wake(self) -> None:
        assert self.weights["model.norm.weight"].untyped_storage().nbytes(), (
            "wake_weights() and a publish must come before wake()"
        )

    def forward(self, tokens: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
        """Return final hidden states [B, Q, hidden] of tokens and positions [B, Q].

        Write the keys and values of the tokens into cache [layers, 2, B, K, G, D].
        """
        arch, w = self.arch, self.weights
        cos, sin = self.rope.tables(positions, self.dtype)  # [B, Q, 1, D/2]
        keys, queries = torch.arange(int(positions.max()) + 1, device=self.device), positions[:, None, :, None]
        seen = keys <= queries  # [B, 1, Q, K]
        if arch.window:
            seen &= keys > queries - arch.window
        x = self._embed(tokens)
        for i in range(arch.layers):
            layer = f"model.layers.{i}."
            h = F.rms_norm(x, (arch.hidden,), w[layer + "input_layernorm.weight"], arch.eps)
            x = x + self._attend(h, layer + "self_attn.", positions, cos, sin, seen, cache[i])
            h = F.rms_norm(x, (arch.hidden,), w[layer + "post_attention_layernorm.weight"], arch.eps)
            gate, up = F.linear(h, w[layer + "mlp.gate_up_proj.weight"]).chunk(2, dim=-1)
            x = x + self._sum(F.linear(F.silu(gate) * up, w[layer + "mlp.down_proj.weight"]))
        return F.rms_norm(x, (arch.hidden,), w["model.norm.weight"], arch.eps)

    def _attend(
        self, h: Tensor, name: str, positions: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, cache: Tensor
    ) -> Tensor:
        """Return causal attention [B, Q, hidden] of h [B, Q, hidden] to the cached tokens of a layer.

        Write the keys and values of h into cache [2, B, K, G, D] first. seen [B, 1, Q, K] is the attention mask.
        """
        arch, w = self.arch, self.weights
        qkv = F.linear(h, w[name + "qkv_proj.weight"], w[name + "qkv_proj.bias"] if arch.row.qkv_bias else None)
        q, k, v = qkv.unflatten(-1, (-1, arch.head_dim)).split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if arch.row.qk_norm:
            q = F.rms_norm(q, (arch.head_dim,), w[name + "q_norm.weight"], arch.eps)
            k = F.rms_norm(k, (arch.head_dim,), w[name + "k_norm.weight"], arch.eps)
        rows = torch.arange(len(h), device=self.device)[:, None]
        cache[0, rows, positions] = rotate(k, cos, sin)
        cache[1, rows, positions] = v
        keys, values = cache[:, :, : seen.shape[-1]].transpose(2, 3)  # [B, G, K, D] each
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin).transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=True
        )
        return self._sum(F.linear(out.transpose(1, 2).flatten(2), w[name + "o_proj.weight"]))

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.weights["model.embed_tokens.weight"]
        local = tokens - self.tp_rank * len(table)
        mine = (local >= 0) & (local < len(table))
        return self._sum(F.embedding(local.where(mine, 0), table) * mine[..., None])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [B, vocab] of hidden [B, hidden], on every rank."""
        weight = self.weights["model.embed_tokens.weight" if self.arch.tied else "lm_head.weight"]
        shard = F.linear(hidden, weight).float()
        if self.group is None:
            return shard[:, : self.arch.vocab]
        shards = [torch.empty_like(shard) for _ in range(self.tp)]
        dist.all_gather(shards, shard, group=self.group)
        return torch.cat(shards, dim=-1)[:, : self.arch.vocab]

    def _sum(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


def choose(logits: Tensor, sampling: Sampling, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Return sampled tokens [B] and their log-probs [B] from logits [B, vocab].

    draw [B] has one uniform random number in [0, 1) for each sequence. The filters have the same order as in vLLM:
    temperature, top-k, then top-p of the remaining tokens. temperature=0 takes the most likely token.
    """
    if sampling.temperature == 0:
        logp, token = logits.log_softmax(dim=-1).max(dim=-1)
        return token, logp
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -math.inf)
    if sampling.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(dim=-1)
        likelier = probs.cumsum(dim=-1) - probs  # probability of all tokens before this one
        logits = logits.scatter(-1, order, ranked.masked_fill(likelier >= sampling.top_p, -math.inf))
    logp = logits.log_softmax(dim=-1)
    mass = logp.double().exp().cumsum(dim=-1)
    token = torch.searchsorted(mass, draw[:, None] * mass[:, -1:], right=True)
    return token[:, 0], logp.gather(-1, token)[:, 0]
