"""The engine "vllm": generation with vLLM. Each rank has a shard of an engine, in the same process as the learner.

Only this file and vllm_private.py import vllm. They work with vLLM 0.25 on a GPU and vLLM 0.32 on a CPU. Prompts and
responses are token ids, so no tokenizer is loaded.
"""

import os
import warnings

import torch

from rlhf.config import CPU_CACHE
from rlhf.contracts import Completion, Engine, Request

# vLLM reads these variables at import. Values that the user has set are kept.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM must run in this process, because a publish writes weights in place
    # FlashInfer has no seeds per request and no log-probs of sampled tokens. It may also not be installed.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",  # lower levels print dozens of lines per rank
    "VLLM_NO_USAGE_STATS": "1",  # send no usage statistics
    "DO_NOT_TRACK": "1",  # the same for other libraries that vLLM uses
}
if not torch.cuda.is_available():
    ENVIRONMENT["TORCHDYNAMO_DISABLE"] = "1"  # on a CPU, compiling one small function takes longer than a whole test
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

from vllm import LLM, SamplingParams  # noqa: E402, because the variables must be set first
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from rlhf.rollout import vllm_private  # noqa: E402


class VLLM(Engine):
    """An Engine that uses vLLM with its executor `external_launcher`.

    Each rank runs its own scheduler. The ranks of an engine make the same choices, because they get the same prompts
    and seeds. Each `tp` consecutive ranks are one engine. vLLM uses torch.distributed if it is initialized. Otherwise
    it initializes it from RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. RANK and LOCAL_RANK must be set in
    both cases. On a CPU, weights and KV cache stay allocated: sleep() and wake_weights() do nothing. vLLM destroys the
    default process group when the LLM object is deleted, so keep the engine until the process ends.
    """

    def __init__(
        self,
        folder: str,  # has a config.json, and weights if `load`
        *,
        tp: int,
        dtype: str,  # "float32" or "bfloat16"
        seed: int,
        max_len: int,  # largest number of tokens of prompt and response together
        memory: float,  # share of the GPU's memory for weights and KV cache; not used on a CPU
        cache: float,  # GiB of KV cache; 0: the rest of `memory` on a GPU, CPU_CACHE on a CPU
        windowless: int = 0,  # number of layers if config.json has a sliding window that max_len does not need; else 0
        load: bool = False,  # load weights from the folder; else a publish must write them before generation
    ):
        self.max_len = max_len
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            device = {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        else:
            vllm_private.adapt_to_cpu()
            # With chunked prefill, vLLM resets the offset of a request's generator. CPU generators do not support this.
            device = {"enforce_eager": True, "enable_chunked_prefill": False}
            cache = cache or CPU_CACHE
        # Without a size, vLLM measures free memory. This fails if other processes use the device at the same time.
        if cache:
            device["kv_cache_memory_bytes"] = int(cache * 2**30)
        # vLLM refuses some configurations in which only some layers have a window.
        whole = {"sliding_window": None, "layer_types": ["full_attention"] * windowless}
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of torch, about names that vLLM uses
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                generation_config="vllm",  # ignore the sampling parameters and stop ids in the folder
                # "auto" would prefer files in Mistral's own format (params.json, consolidated.safetensors)
                config_format="hf",
                load_format="safetensors" if load else "dummy",
                hf_overrides=whole if windowless else {},
                dtype=dtype,
                seed=seed,
                tensor_parallel_size=tp,
                distributed_executor_backend="external_launcher",
                max_model_len=max_len,
                logprobs_mode="processed_logprobs",  # log-probs of the sampled distribution
                use_tqdm_on_load=False,
                **device,
            )
        vllm_private.check(self.llm)
        vllm_private.drop_broadcaster()
        self.held: dict[int, Request] = {}
        self._parameters = vllm_private.parameters(self.llm)

    def submit(self, requests: list[Request]) -> None:
        """Add requests to the end of the queue.

        Log-probs are those of the sampled distribution, after temperature, top-k and top-p. With temperature=0 they are
        those of the distribution at temperature 1.

        Every request needs its own seed. Without seeds, the ranks of an engine would use global random states, which
        differ. With a common seed, all responses of a group would be equal.
        """
        for request in requests:
            assert 0 < len(request.prompt) < self.max_len, (
                f"a prompt is empty or leaves no room in {self.max_len} tokens"
            )
            assert request.key not in self.held, f"two requests have the key {request.key}"
            self.held[request.key] = request
            s = request.sampling
            params = SamplingParams(
                seed=request.seed,
                max_tokens=s.max_tokens,
                temperature=s.temperature,
                top_p=s.top_p,
                top_k=s.top_k,
                stop_token_ids=list(s.stop_ids),
                ignore_eos=True,  # only stop_token_ids end a response
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,  # lists of numbers instead of one dict per token
                detokenize=False,
                # FINAL_ONLY needs no Python code in each step, but `ends` needs the tokens of each step.
                output_kind=RequestOutputKind.CUMULATIVE if request.ends else RequestOutputKind.FINAL_ONLY,
            )
            self.llm.llm_engine.add_request(str(request.key), {"prompt_token_ids": request.prompt}, params)

    def advance(self) -> list[tuple[int, Completion]]:
        # On a CPU, vLLM's sampler also uses the global generator, even for requests with a seed. Its state is restored.
        with torch.random.fork_rng(devices=[]):
            outputs = self.llm.llm_engine.step()
        found = []
        for output in outputs:
            key, drawn = int(output.request_id), output.outputs[0]
            ends, finish = self.held[key].ends, drawn.finish_reason
            if not output.finished and ends and ends(drawn.token_ids):
                self.llm.llm_engine.abort_request([output.request_id])
                finish = "stop"
            if finish:
                del self.held[key]
                found.append((key, Completion(list(drawn.token_ids), list(drawn.logprobs.logprobs), finish)))
        return found

    def withdraw(self) -> list[tuple[int, Completion]]:
        found = [(key, Completion(*vllm_private.drawn(self.llm, str(key)), "held")) for key in self.held]
        self.llm.llm_engine.abort_request([str(key) for key in self.held])
        self.held = {}
        return found

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return this rank's shards by vLLM's fused names, without a tied lm_head. A publish writes them in place."""
        return self._parameters

    def sleep(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()  # vLLM may still compute a step ahead, for requests that it has dropped
            self.llm.sleep(level=2)  # level 1 would copy the weights to the host; they are published again anyway

    def wake_weights(self) -> None:
        if self.on_gpu:
            self.llm.wake_up(tags=["weights"])

    def wake(self) -> None:
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():  # the cached blocks were computed with older weights
            raise RuntimeError("vLLM could not reset its prefix cache: it still has unfinished requests")
