"""Scalars for an MLflow server, by its documented REST API, version 2.0 (mlflow.org/docs/latest/rest-api.html).

MLflow's own client would bring dozens of packages, some with limits that contradict Flower's; six requests do. A run
that is resumed goes on in MLflow too: it is found by its tag. MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD, are sent as MLflow's client sends them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from common.errors import RunError
from server.tracking.scalars import Scalar

__all__ = ["Mlflow"]

EXPERIMENT = "coadapt"
TAG = "coadapt.run_id"

# The API's limits of one request, and of a setting's value in servers before 2.8.
MOST_METRICS, MOST_PARAMS, MOST_LETTERS = 1000, 100, 500

STATUS = {"finished": "FINISHED", "interrupted": "KILLED"}


class Mlflow:
    """Sends to the server at `address`.

    Raises:
        RunError: the address is none, or no MLflow answers there.
    """

    def __init__(self, address: str, *, seconds: float = 5.0, transport: httpx.BaseTransport | None = None) -> None:
        if not address.startswith(("http://", "https://")):
            raise RunError(
                f"--log-to mlflow:{address}: must be the http or https address of a server; `mlflow server` starts one"
            )
        self._address = address.rstrip("/")
        headers, login = _credentials()
        self._client = httpx.Client(
            base_url=f"{self._address}/api/2.0/mlflow/", timeout=seconds, headers=headers, auth=login,
            transport=transport,
        )  # fmt: skip
        self._run = ""
        self._experiment = self._find_experiment()

    def start(self, run_id: str, settings: Mapping[str, str], time: float) -> None:
        """Begin a run, or go on with the one of that name."""
        query = {"experiment_ids": [self._experiment], "filter": f"tags.`{TAG}` = '{run_id}'", "max_results": 1}
        found = self._ask("POST", "runs/search", json=query).get("runs")
        if found:
            self._run = found[0]["info"]["run_id"]
            self._ask("POST", "runs/update", json={"run_id": self._run, "status": "RUNNING"})
            return
        run = {
            "experiment_id": self._experiment,
            "run_name": run_id,
            "start_time": _milliseconds(time),
            "tags": [{"key": TAG, "value": run_id}],
        }
        self._run = self._ask("POST", "runs/create", json=run)["run"]["info"]["run_id"]
        params = [{"key": key, "value": value[:MOST_LETTERS]} for key, value in settings.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._batch(params=params[first : first + MOST_PARAMS])

    def log(self, scalars: Sequence[Scalar]) -> None:
        """Send scalars."""
        metrics = [
            {"key": each.name, "value": each.value, "timestamp": _milliseconds(each.time), "step": each.step}
            for each in scalars
        ]
        for first in range(0, len(metrics), MOST_METRICS):
            self._batch(metrics=metrics[first : first + MOST_METRICS])

    def stop(self, status: str, time: float) -> None:
        """Say how the run ended."""
        end = {"run_id": self._run, "status": STATUS.get(status, "FAILED"), "end_time": _milliseconds(time)}
        self._ask("POST", "runs/update", json=end)

    def _find_experiment(self) -> str:
        found = self._ask("GET", "experiments/get-by-name", missing=True, params={"experiment_name": EXPERIMENT})
        if found:
            return str(found["experiment"]["experiment_id"])
        return str(self._ask("POST", "experiments/create", json={"name": EXPERIMENT})["experiment_id"])

    def _batch(self, **values: list[dict[str, Any]]) -> None:
        self._ask("POST", "runs/log-batch", json={"run_id": self._run, **values})

    def _ask(self, method: str, path: str, *, missing: bool = False, **options: Any) -> dict[str, Any]:
        """The server's answer; empty where it knows no such thing and `missing` allows that."""
        try:
            answer = self._client.request(method, path, **options)
            body = answer.json()
        except httpx.HTTPError as error:
            raise RunError(f"MLflow at {self._address} does not answer: {type(error).__name__}") from error
        except ValueError as error:
            raise RunError(f"{self._address} is no MLflow server: its answer to {path} is not JSON") from error
        if missing and answer.status_code == httpx.codes.NOT_FOUND:
            return {}
        if not answer.is_success or not isinstance(body, dict):
            code = body.get("error_code", "") if isinstance(body, dict) else ""
            raise RunError(f"MLflow at {self._address} refused {path}: {answer.status_code} {code}".rstrip())
        return body


def _milliseconds(time: float) -> int:
    return round(time * 1000)


def _credentials() -> tuple[dict[str, str], tuple[str, str] | None]:
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    name, password = (os.environ.get(f"MLFLOW_TRACKING_{part}") for part in ("USERNAME", "PASSWORD"))
    login = (name, password) if name and password and not token else None
    return ({"Authorization": f"Bearer {token}"} if token else {}), login
