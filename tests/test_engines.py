"""Both engines against transformers, on random models of a few thousand parameters."""

from pathlib import Path

import kvcache_rank
import pytest
import torch
import torch.multiprocessing
import transformers

from rlhf.contracts import Completion, Engine, Request, Sampling
from rlhf.model import architecture
from rlhf.rollout import kvcache
from rlhf.rollout.kvcache import KVCache

SIZES = {
    "vocab_size": 101,  # not a multiple of 64, so that padding is needed
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's CPU attention needs multiples of 32
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that the scaled frequencies matter here
}
MODELS = {  # prefix of the class names, and the keys of config.json besides SIZES
    "llama": ("Llama", {}),
    "llama-tied-llama3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "mistral-tied-llama3": ("Mistral", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "sliding_window": 10}),
    "phi3": (
        "Phi3",
        {"hidden_size": 128, "sliding_window": 30, "pad_token_id": None},
    ),  # its head_dim is hidden / heads
    "qwen2-yarn": (
        "Qwen2",
        {"hidden_size": 128, "rope_parameters": YARN, "use_sliding_window": True, "max_window_layers": 1}
        | {"sliding_window": 192},  # of one of two layers, and as long as MAX_LEN, so it has no effect
    ),  # its head_dim is hidden / heads, too
    "qwen3": ("Qwen3", {}),
}
MAX_LEN = 192
LONG = [i * i % 101 for i in range(150)]  # fills a block of vLLM's prefix cache, which has 128 tokens on a CPU
PROMPTS = [[5, 9, 33], [7], LONG, [100, 0, 64, 65, 1, 2, 3, 4, 90, 17, 18, 19, 20]]
SEEDS = [11, 22, 33, 44]
GREEDY = Sampling(max_tokens=8, temperature=0.0)


def build(kind: str, seed: int = 0):
    """Make a random model of transformers, with weights so large that no two tokens tie."""
    name, changes = MODELS[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes), attn_implementation="eager")
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(
            parameter
        )  # biases and norms too: at their initial 0 and 1 they would test nothing
    return model


def folder(model, path: Path) -> str:
    model.save_pretrained(path)
    return str(path)


def shards(model, arch, tp: int, rank: int) -> dict[str, torch.Tensor]:
    """Return the shard of rank `rank` of tp, with vLLM's names.

    This is a second implementation, independent of the one in rlhf.
    """
    state, out = model.state_dict(), {}

    def rows(tensor, parts, part):
        return tensor.chunk(parts)[part]

    for name in ["model.embed_tokens.weight"] + ([] if arch.tied else ["lm_head.weight"]):
        table = torch.nn.functional.pad(state[name], (0, 0, 0, arch.padded_vocab(tp) - arch.vocab))
        out[name] = rows(table, tp, rank)
    copies = max(1, tp // arch.kv_heads)  # number of ranks that hold the same kv head
    for name, tensor in state.items():
        if name.endswith("norm.weight") or (tp == 1 and ("qkv_proj" in name or "gate_up_proj" in name)):
            out[name] = tensor
        elif "q_proj" in name:
            k, v = state[name.replace("q_proj", "k_proj")], state[name.replace("q_proj", "v_proj")]
            kv = [rows(x, tp // copies, rank // copies) for x in (k, v)]
            out[name.replace("q_proj", "qkv_proj")] = torch.cat([rows(tensor, tp, rank), *kv])
        elif "gate_proj" in name:
            up = state[name.replace("gate_proj", "up_proj")]
            out[name.replace("gate_proj", "gate_up_proj")] = torch.cat([rows(tensor, tp, rank), rows(up, tp, rank)])
        elif "o_proj" in name or "down_proj" in name:
            out[name] = tensor.chunk(tp, dim=1)[rank]
    return out


def publish(model, arch, engine: Engine) -> None:
    source, target = shards(model, arch, 1, 0), engine.parameters()
    assert {k: tuple(v.shape) for k, v in target.items()} == {k: tuple(v.shape) for k, v in source.items()}
    for name, tensor in source.items():
        target[name].data.copy_(tensor)
    engine.wake()


def plain(model, arch) -> KVCache:
    engine = KVCache(arch, tp=1, tp_rank=0, group=None, dtype=torch.float32, device="cpu", max_len=MAX_LEN)
    publish(model, arch, engine)
    return engine


def reference_logp(model, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Return transformers' log-probs of the response, and for greedy decoding the likeliest token at each place."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)


def check_greedy(model, engine: Engine, tolerance: float) -> None:
    for prompt, completion in zip(PROMPTS, engine.generate(PROMPTS, GREEDY, SEEDS), strict=True):
        logp = reference_logp(model, prompt, completion.tokens)
        assert completion.tokens == logp.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logp), logp.max(-1).values, rtol=0, atol=tolerance)
        assert (len(completion.tokens), completion.finish) == (GREEDY.max_tokens, "length")


def check_sampled(model, engine: Engine, tolerance: float) -> None:
    """Check log-probs at the sampling temperature, and that tokens depend on (prompt, seed) alone."""
    sampling = Sampling(max_tokens=12, temperature=0.7)
    together = engine.generate(PROMPTS, sampling, SEEDS)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        logp = reference_logp(model, prompt, completion.tokens, 0.7).gather(
            1, torch.tensor(completion.tokens)[:, None]
        )[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logp), logp, rtol=0, atol=tolerance)
    backwards = engine.generate(PROMPTS[::-1], sampling, SEEDS[::-1])[::-1]
    alone = [engine.generate([prompt], sampling, [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert [c.tokens for c in together] == [c.tokens for c in backwards] == [c.tokens for c in alone]
    siblings = engine.generate([PROMPTS[0]] * 8, sampling, list(range(8)))
    assert len({tuple(c.tokens) for c in siblings}) == 8


def check_many(engine: Engine) -> None:
    """Check that the tokens do not change if there are more prompt tokens than vLLM takes at once."""
    many, sampling = (
        [[1 + (i * j) % 29 for j in range(150)] for i in range(64)],
        Sampling(max_tokens=2, temperature=1.0),
    )
    together = engine.generate(many, sampling, list(range(64)))
    for i in (0, 26, 27, 28, 54, 55, 63):
        assert together[i].tokens == engine.generate([many[i]], sampling, [i])[0].tokens


def check_mixed(engine: Engine) -> None:
    """Check that each request has its own temperature: the tokens are those without requests of other temperatures."""
    heats = [0.7, 0.0, 0.1, 0.7]
    samplings = [Sampling(max_tokens=6 + i, temperature=heat) for i, heat in enumerate(heats)]
    asked = [Request(*each) for each in zip(range(4), PROMPTS, samplings, SEEDS, strict=True)]
    alone = {r.key: engine.generate([r.prompt], r.sampling, [r.seed])[0].tokens for r in asked}
    engine.submit(asked)
    found: dict[int, list[int]] = {}
    while len(found) < len(asked):
        found |= {key: completion.tokens for key, completion in engine.advance()}
    assert found == alone
    assert [len(found[key]) for key in range(4)] == [6, 7, 8, 9]


def check_stream(engine: Engine) -> None:
    """Check that a response is returned as soon as it is complete, while others continue.

    A request with `ends` stops when this function returns True.
    """
    sampling, asked = Sampling(max_tokens=12, temperature=1.0), []
    whole = engine.generate(PROMPTS, sampling, SEEDS)

    def ends(tokens: list[int]) -> bool:
        asked.append(list(tokens))
        return len(tokens) == 3

    pairs = zip(PROMPTS, SEEDS, strict=True)
    engine.submit(
        [Request(10 + i, prompt, sampling, seed, None if i else ends) for i, (prompt, seed) in enumerate(pairs)]
    )
    steps: list[list[tuple[int, Completion]]] = []
    while sum(map(len, steps)) < len(PROMPTS):
        steps.append(engine.advance())
    found = dict(pair for step in steps for pair in step)
    assert [key for key, _ in next(step for step in steps if step)] == [10], "before the others"
    assert (found[10].tokens, found[10].logp, found[10].finish) == (
        whole[0].tokens[:3],
        pytest.approx(whole[0].logp[:3]),
        "stop",
    )
    assert asked == [whole[0].tokens[:n] for n in (1, 2, 3)]
    assert [found[10 + i].tokens for i in range(1, len(PROMPTS))] == [c.tokens for c in whole[1:]]
    assert engine.generate(PROMPTS, sampling, SEEDS) == whole, "nothing is left of a request that ended early"


def check_withdraw(engine: Engine, old, new, arch, tolerance: float) -> None:
    """Check that a withdrawn completion is a prefix of the whole response.

    It can be continued as a longer prompt with other weights, and two runs agree.
    """
    sampling = Sampling(max_tokens=12, temperature=1.0)

    def continued() -> list[tuple[list[int], list[int], list[float]]]:
        publish(old, arch, engine)
        whole = engine.generate(PROMPTS, sampling, SEEDS)
        engine.submit(
            [Request(i, prompt, sampling, seed) for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True))]
        )
        for _ in range(7):
            assert engine.advance() == []
        held = dict(engine.withdraw())
        assert engine.withdraw() == []
        assert held.keys() == set(range(len(PROMPTS)))
        for i, part in held.items():
            n = len(part.tokens)
            assert 0 < n < 12
            assert (part.tokens, part.logp, part.finish) == (
                whole[i].tokens[:n],
                pytest.approx(whole[i].logp[:n], abs=tolerance),
                "held",
            )
        engine.submit([Request(9, PROMPTS[0], sampling, 1)])
        assert engine.withdraw() == [(9, Completion([], [], "held"))], "before it has begun"
        publish(new, arch, engine)
        rest = [Sampling(max_tokens=12 - len(held[i].tokens), temperature=1.0) for i in range(len(PROMPTS))]
        prompts = [prompt + held[i].tokens for i, prompt in enumerate(PROMPTS)]
        engine.submit(
            [Request(i, prompt, rest[i], seed + 1) for i, (prompt, seed) in enumerate(zip(prompts, SEEDS, strict=True))]
        )
        found: dict[int, Completion] = {}
        while len(found) < len(PROMPTS):
            found.update(engine.advance())
        return [(prompt, found[i].tokens, found[i].logp) for i, prompt in enumerate(prompts)]

    first = continued()
    assert first == continued()
    for prompt, tokens, given in first:
        logp = reference_logp(new, prompt, tokens).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(given), logp, rtol=0, atol=tolerance)


def check_limits(engine: Engine) -> None:
    greedy = engine.generate(PROMPTS, GREEDY, SEEDS)
    stop = greedy[0].tokens[2]
    first = greedy[0].tokens.index(stop) + 1
    completion = engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=0.0, stop_ids=(stop,)), SEEDS)[0]
    assert (completion.tokens, completion.finish) == (greedy[0].tokens[:first], "stop")
    assert len(completion.logp) == first
    long = [1] * (MAX_LEN - 3)  # the context ends this response before max_tokens does, but not the other one
    cut, neighbour = engine.generate([long, PROMPTS[0]], GREEDY, SEEDS[:2])
    assert (len(cut.tokens), cut.finish) == (3, "length")
    assert neighbour.tokens == greedy[0].tokens
    likeliest = engine.generate(PROMPTS, Sampling(max_tokens=8, temperature=2.0, top_k=1), SEEDS)
    assert [c.tokens for c in likeliest] == [c.tokens for c in greedy]
    assert all(logp == 0 for c in likeliest for logp in c.logp)  # of the distribution that was sampled
    assert engine.generate([], GREEDY, []) == []


@pytest.mark.parametrize("kind", MODELS)
def test_kvcache_equals_transformers(kind, tmp_path):
    model = build(kind)
    arch = architecture.read(folder(model, tmp_path))
    engine = plain(model, arch)
    check_greedy(model, engine, 1e-5)
    check_sampled(model, engine, 1e-5)
    check_limits(engine)
    check_stream(engine)
    check_mixed(engine)


def test_kvcache_sleeps_and_wakes_with_new_weights(tmp_path):
    old, new = build("llama", 0), build("llama", 1)
    arch = architecture.read(folder(old, tmp_path))
    engine = plain(old, arch)
    engine.sleep()
    assert not any(weight.untyped_storage().nbytes() for weight in engine.parameters().values())
    engine.wake_weights()
    publish(new, arch, engine)
    check_greedy(new, engine, 1e-5)
    check_withdraw(engine, old, new, arch, 1e-5)


def test_kvcache_splits_long_lists_into_batches(tmp_path, monkeypatch):
    model = build("llama")
    engine = plain(model, architecture.read(folder(model, tmp_path)))
    monkeypatch.setattr(kvcache, "BATCH", 30)  # tokens: the two shortest prompts together, the others one by one
    check_greedy(model, engine, 1e-5)


def test_choose_draws_from_the_filtered_distribution():
    probs = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000  # evenly spaced: the frequencies are exact
    logits = probs.log().expand(1000, -1)
    cases = {
        Sampling(max_tokens=1): [100, 400, 50, 300, 150],
        Sampling(max_tokens=1, top_k=2): [0, 571, 0, 429, 0],  # 4/7 and 3/7
        Sampling(max_tokens=1, top_p=0.75): [0, 471, 0, 353, 176],  # 0.4 + 0.3 is less than 0.75, so 0.15 is included
        Sampling(max_tokens=1, top_p=0.69): [0, 571, 0, 429, 0],
        Sampling(max_tokens=1, top_p=0.01): [0, 1000, 0, 0, 0],
        Sampling(max_tokens=1, top_k=2, top_p=0.5): [
            0,
            1000,
            0,
            0,
            0,
        ],  # after top-k, 4/7 alone exceeds 0.5
        Sampling(max_tokens=1, temperature=0.5): [35, 561, 9, 316, 79],  # squares over 0.285
    }
    for sampling, expected in cases.items():
        token, logp = kvcache.choose(logits, sampling, draws)
        counts = torch.bincount(token, minlength=5)
        assert (counts - torch.tensor(expected)).abs().max() <= 1, (sampling, counts)
        torch.testing.assert_close(logp.exp(), counts[token] / 1000, rtol=0, atol=2e-3)


def test_kvcache_tensor_parallel(tmp_path):
    sampling = Sampling(max_tokens=8, temperature=0.8)
    whole = {}
    for kind in ("llama", "llama-tied-llama3", "llama-one-kv-head", "qwen2-yarn"):
        model = build(kind)
        arch = architecture.read(folder(model, tmp_path / kind))
        whole[kind] = plain(model, arch).generate(PROMPTS, sampling, SEEDS)
        torch.save([shards(model, arch, 2, rank) for rank in range(2)], tmp_path / kind / "shards.pt")
    torch.multiprocessing.spawn(kvcache_rank.run, (list(whole), PROMPTS, sampling, SEEDS, MAX_LEN, tmp_path), nprocs=2)
    for kind, expected in whole.items():
        for rank in range(2):
            split = torch.load(tmp_path / kind / f"completions-{rank}.pt", weights_only=False)
            assert [c.tokens for c in split] == [c.tokens for c in expected], (kind, rank)
            for a, b in zip(split, expected, strict=True):
                torch.testing.assert_close(torch.tensor(a.logp), torch.tensor(b.logp), rtol=0, atol=1e-5)
