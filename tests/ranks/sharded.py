"""Run under torchrun: a megatron-core model saves a torch_dist folder, and loads one that this program wrote.

usage: torchrun --nproc-per-node TP tests/ranks/sharded.py MODEL OURS THEIRS

MODEL is a Hugging Face folder. The loaded state is written to THEIRS/state-RANK.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    import torch  # here: the processes that saving starts import this file too
    import torch.nn.functional as F

    from rlhf.config import Parallel
    from rlhf.model import architecture
    from rlhf.parallel.mesh import Mesh
    from rlhf.weights import files, names

    # isort: split
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    arch, ours, theirs = architecture.read(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    tp = int(os.environ["WORLD_SIZE"])
    mesh = Mesh(Parallel(tp=tp), 1)
    config = TransformerConfig(
        num_layers=arch.layers, hidden_size=arch.hidden, ffn_hidden_size=arch.ffn, num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads, kv_channels=arch.head_dim, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=F.silu, add_bias_linear=False, tensor_model_parallel_size=tp, use_cpu_initialization=True,
        params_dtype=torch.float32,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(
        config, spec, vocab_size=arch.vocab, max_sequence_length=arch.context, position_embedding_type="rope"
    )
    parameters = {name: p.data for name, p in model.named_parameters()}
    files.read(sys.argv[1], arch, names.tiles(arch, "megatron", mesh.place), parameters)
    if mesh.rank == 0:
        (theirs / "iter_0000005").mkdir(parents=True)
        (theirs / "latest_checkpointed_iteration.txt").write_text("5")
    mesh.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), theirs / "iter_0000005")
    for tensor in parameters.values():
        tensor.fill_(torch.nan)
    model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, ours)["model"], strict=True)
    torch.save(parameters, theirs / f"state-{mesh.rank}.pt")
    mesh.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # saving starts processes
    main()
