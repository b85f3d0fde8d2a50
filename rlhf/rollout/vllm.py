"""Generation with vLLM, one shard of the engine per rank, in the trainer's own process. Only this file and vllm_private.py import vllm.

Works with vLLM 0.25 on a GPU and vLLM 0.32 on a CPU. Token ids go in and come out; no tokenizer is loaded.
"""

import os
import warnings

import torch

from rlhf.config import CPU_CACHE
from rlhf.contracts import Completion, Engine, Request

# vLLM reads these while it is imported; what the user has set wins.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler runs in this process: we write the weights in place
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it can neither seed requests one by one nor return their log-probs, and may be absent
    "VLLM_LOGGING_LEVEL": "ERROR",  # dozens of lines per rank of how vLLM configures itself otherwise
    "VLLM_NO_USAGE_STATS": "1",  # nothing about a run leaves the machine
    "DO_NOT_TRACK": "1",  # the same, for the libraries below vLLM
}
if not torch.cuda.is_available():
    ENVIRONMENT["TORCHDYNAMO_DISABLE"] = "1"  # on a CPU, compiling one small helper takes longer than a whole test
for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)

from vllm import LLM, SamplingParams  # noqa: E402, so late because of the environment
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from rlhf.rollout import vllm_private  # noqa: E402


class VLLM(Engine):
    """The protocol Engine over vLLM's `external_launcher`: every rank runs its own scheduler, and ranks of one engine agree
    because they get the same prompts and the same seed for every request.

    An initialised torch.distributed world is inherited: each tp consecutive ranks are one engine. Otherwise vLLM makes a world
    from RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; the first two must be set in any case.
    On a CPU nothing can sleep: sleep() and the wakes keep weights and cache where they are.
    An engine that goes takes the default process group along, whoever made it: keep the engine, and simply end the process.
    """

    def __init__(
        self,
        folder: str,  # with a config.json; weights are read only if load
        *,
        tp: int,
        dtype: str,  # "float32" or "bfloat16"
        seed: int,
        max_len: int,  # prompt and response together, in tokens
        memory: float,  # share of the device's memory for weights and KV cache (GPU)
        cache: float,  # GiB of KV cache; 0: what memory leaves on a GPU, CPU_CACHE on a CPU
        load: bool = False,  # weights from the folder; otherwise parameters() awaits a publish
    ):
        self.max_len = max_len
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            device = {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        else:
            vllm_private.adapt_to_cpu()
            # A prompt that is cut into chunks winds its request's generator back, which a generator of the CPU cannot do.
            device = {"enforce_eager": True, "enable_chunked_prefill": False}
            cache = cache or CPU_CACHE
        if cache:  # given, so that vLLM need not find out by measuring, which fails where others use the device at the same time
            device["kv_cache_memory_bytes"] = int(cache * 2**30)
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # of names that vLLM touches in torch
            self.llm = LLM(
                model=folder,
                skip_tokenizer_init=True,
                generation_config="vllm",  # stop ids and sampling come from the caller, never from the folder
                load_format="auto" if load else "dummy",
                dtype=dtype,
                seed=seed,
                tensor_parallel_size=tp,
                distributed_executor_backend="external_launcher",
                max_model_len=max_len,
                logprobs_mode="processed_logprobs",  # log-probs of the distribution that was sampled from
                use_tqdm_on_load=False,
                **device,
            )
        vllm_private.check(self.llm)
        vllm_private.drop_broadcaster()
        self.held: dict[int, Request] = {}
        self._parameters = vllm_private.parameters(self.llm)

    def submit(self, requests: list[Request]) -> None:
        """Log-probs are of the distribution drawn from, after temperature, top-k and top-p; at temperature 0, of the plain distribution.

        Every request needs its own seed: without one, ranks of an engine would draw from global random states that differ; with a shared
        one, siblings of a group would come out alike.
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
                ignore_eos=True,  # the caller's stop ids alone end a response
                logprobs=0,  # of the sampled token only
                flat_logprobs=True,  # lists of numbers instead of one dict per token
                detokenize=False,
                # What is not watched costs no Python in each step.
                output_kind=RequestOutputKind.CUMULATIVE if request.ends else RequestOutputKind.FINAL_ONLY,
            )
            self.llm.llm_engine.add_request(str(request.key), {"prompt_token_ids": request.prompt}, params)

    def advance(self) -> list[tuple[int, Completion]]:
        with torch.random.fork_rng(
            devices=[]
        ):  # the CPU sampler draws from the global generator even for seeded requests
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
        """This rank's shards by vLLM's fused names; a tied lm_head is not listed. Write them in place."""
        return self._parameters

    def sleep(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()  # vLLM is a step ahead, and may be computing tokens of what it no longer holds
            self.llm.sleep(level=2)  # level 1 would copy the weights to the host, but publish brings newer ones

    def wake_weights(self) -> None:
        if self.on_gpu:
            self.llm.wake_up(tags=["weights"])

    def wake(self) -> None:
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():  # its blocks were computed with older weights
            raise RuntimeError("vLLM has not dropped its cache: it still holds requests")
