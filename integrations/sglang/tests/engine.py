"""SGLang's scheduler over a tiny model on a CPU, in this process: its loop, a step at a time, and what it says of each token."""

from __future__ import annotations

from array import array
from typing import Any

import sglang.srt.managers.scheduler as scheduling
import torch
from sglang.srt.distributed import bootstrap, parallel_state
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import SpawnRanks, publish, reset_context, spawn_world_rank
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, ServerArgs
from tiny import Model


class Engine:
    """A scheduler, and requests to it by label."""

    def __init__(self, model: Model, targets: set[str], **options: Any) -> None:
        chosen = {"max_loras_per_batch": 3, "max_lora_rank": 16, "max_total_tokens": 256, "max_running_requests": 6}
        chosen |= {"chunked_prefill_size": 64, "max_prefill_tokens": 64, "page_size": 1, "mem_fraction_static": 0.1}
        self.args = ServerArgs(
            model_path=model.base, device="cpu", attention_backend="torch_native", skip_tokenizer_init=True, enable_lora=True,
            lora_target_modules=targets, lora_paths=[], dtype=str(model.dtype).removeprefix("torch."), disable_radix_cache=True,
            disable_cuda_graph=True, disable_overlap_schedule=True, random_seed=0, **(chosen | options),
        )  # fmt: skip
        load_plugins()
        ranks = SpawnRanks(world_rank=spawn_world_rank(self.args, tp_rank=0, pp_rank=0), gpu_id=0)
        publish(self.args, role="scheduler", ranks=ranks)
        self.scheduler = scheduling.Scheduler(self.args, PortArgs.init_new(self.args))
        self.model, self.manager = model, self.scheduler.tp_worker.model_runner.lora_manager
        self.steps: dict[str, list[torch.Tensor]] = {}
        self.requests: dict[str, Any] = {}
        self.refs: dict[str, LoRARef] = {}

    def load(self, name: str) -> None:
        folder = str(self.model.folder / name)
        self.refs[name] = LoRARef(lora_id=name, lora_name=name, lora_path=folder, pinned=False)
        result = self.manager.load_lora_adapter(self.refs[name])
        assert result.success, result.error_message

    def unload(self, name: str) -> None:
        result = self.manager.unload_lora_adapter(self.refs.pop(name))
        assert result.success, result.error_message

    def add(self, label: str, prompt: list[int], name: str | None, max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=max_tokens, ignore_eos=True)
        params.normalize(None)
        nothing = dict.fromkeys(("input_embeds", "mm_inputs", "token_type_ids", "token_ids_logprob"))
        nothing |= {"input_text": "", "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "stream": False}
        request = {"rid": label, "input_ids": array("q", prompt), "sampling_params": params, "lora_id": name}
        self.scheduler.handle_generate_request(TokenizedGenerateReqInput(**request, **nothing))

    def step(self) -> int:
        """One turn of the scheduler's loop; how many requests were in it."""
        scheduler = self.scheduler
        plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        if batch:
            requests = list(batch.reqs)
            result = scheduler.run_batch(batch)
            logits = result.logits_output.next_token_logits.float().log_softmax(-1)
            answered = [len(request.output_ids) for request in requests]
            scheduler.process_batch_result(batch, result)
            for request, row, before in zip(requests, logits, answered, strict=True):
                self.requests[request.rid] = request
                if len(request.output_ids) > before:  # not the first part of a prompt
                    self.steps.setdefault(request.rid, []).append(row)
        scheduler.last_batch = batch
        return len(batch.reqs) if batch else 0

    def close(self) -> None:
        """Leave the process to another engine."""
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
        bootstrap._PARALLEL_INITIALISED = False
        reset_context()

    def finished(self) -> list[str]:
        """Labels of requests that are done."""
        return [label for label, request in self.requests.items() if request.finished()]

    def check(self, label: str, name: str | None) -> None:
        """That a finished request is right."""
        request = self.requests[label]
        prompt, answer = list(request.origin_input_ids), list(request.output_ids)
        self.model.check(label, name, prompt, answer, torch.stack(self.steps[label]))
