"""A plain Flower app for comparison, in the manner of Flower's own fine-tuning example.

Every client call loads the base model, attaches an adapter, reads and encodes its records, trains and replies; the
strategy is Flower's FedAvg. Nothing of Coadapt is used but the records' files and the worker settings.
"""

import json
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.config.manifest import Manifest
from simulations.app import THREADS
from simulations.slots import Plan

__all__ = ["plain_client", "run_plain"]

plain_client = ClientApp()


def _load(folder: str, labels: int, rank: int, alpha: float) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)
    targets = ["query", "key", "value", "dense"]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="SEQ_CLS")
    return get_peft_model(model, config)


@plain_client.train()
def train(message: Message, context: Context) -> Message:
    """One client's round: load everything, train, reply with the adapter."""
    torch.set_num_threads(int(os.environ.get(THREADS, "1")))
    settings = message.content.config_records["config"]
    labels = str(settings["labels"]).split("\n")
    model = _load(str(settings["base"]), len(labels), int(settings["rank"]), float(settings["alpha"]))  # type: ignore[arg-type]
    set_peft_model_state_dict(model, message.content.array_records["arrays"].to_torch_state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(settings["base"]))
    home = Path(str(settings["sites"])) / str(int(context.node_config["partition-id"]) + 1)
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=int(settings["length"]))  # type: ignore[arg-type]
    targets = [labels.index(row["label"]) for row in rows]
    steps, size = int(settings["steps"]), int(settings["batch"])  # type: ignore[arg-type]
    seconds, loss = _train(
        model, tokenizer, encoded["input_ids"], targets, steps, size, settings["precision"] == "bf16"
    )
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(rows), "seconds": seconds})
    state = OrderedDict(get_peft_model_state_dict(model, save_embedding_layers=False))
    content = RecordDict({"arrays": ArrayRecord(state), "metrics": metrics})
    return Message(content, reply_to=message)


def _train(
    model: Any, tokenizer: Any, ids: list[list[int]], targets: list[int], steps: int, size: int, half: bool
) -> tuple[float, float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    order = torch.randperm(len(ids)).tolist()
    model.train()
    loss = torch.zeros(())
    began = time.perf_counter()
    for step in range(steps):
        rows = [order[(step * size + place) % len(order)] for place in range(size)]
        batch = tokenizer.pad([{"input_ids": ids[row]} for row in rows], return_tensors="pt", pad_to_multiple_of=8)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch, labels=torch.tensor([targets[row] for row in rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began, float(loss)


def run_plain(app: Any, manifest: Manifest, sites: Path, base: Path, plan: Plan) -> tuple[float, list[float]]:
    """Run the rounds; end of the last one in seconds since 1970, and seconds in training steps of each client call."""
    from flwr.simulation import run_simulation

    seconds: list[float] = []
    ended: list[float] = []

    class Timed(FedAvg):
        """FedAvg that notes what the clients say about their time."""

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            received = list(replies)
            for reply in received:
                seconds.append(float(reply.content.metric_records["metrics"]["seconds"]))
            result = super().aggregate_train(server_round, received)
            ended.append(time.time())
            return result

    server = ServerApp()
    count = len(list(sites.glob("[0-9]*"))) - 1  # the pooled folder is no client
    invited = manifest.training.invited(count)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        section = manifest.adapter
        model = _load(str(base), len(manifest.task.labels), section.rank, section.alpha)
        arrays = ArrayRecord(OrderedDict(get_peft_model_state_dict(model, save_embedding_layers=False)))
        config = ConfigRecord(
            {
                "base": str(base),
                "sites": str(sites),
                "labels": "\n".join(manifest.task.labels),
                "rank": section.rank,
                "alpha": section.alpha,
                "length": manifest.data.max_length,
                "steps": manifest.training.local_steps,
                "batch": manifest.training.batch_size,
                "precision": "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32",
            }
        )
        strategy = Timed(
            fraction_train=invited / count, fraction_evaluate=0.0, min_train_nodes=invited, min_available_nodes=count
        )
        strategy.start(grid, arrays, num_rounds=manifest.training.rounds, train_config=config)

    os.environ[THREADS] = str(plan.threads)
    os.environ["OMP_NUM_THREADS"] = str(plan.threads)
    init: dict[str, Any] = {"num_cpus": plan.workers, "log_to_driver": False, "logging_level": "ERROR"}
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": plan.gpu_share}
    run_simulation(server, app, count, backend_config={"client_resources": resources, "init_args": init})
    return ended[-1], seconds
