"""llama-server as it is in xllamacpp, in a process of its own, until its input ends: `python serve.py MODEL MMPROJ`.

Prints its address once it answers.
"""

import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = sys.argv[1:3]
    params.n_ctx = 1024
    params.n_parallel = 1
    params.port = 0
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    print(f"ADDRESS {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
