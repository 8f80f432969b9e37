#!/bin/sh
# Run all measurements that need a GPU, in under nine minutes; see gpu_suite.py.
#
#   benchmarks/gpu_suite.sh [--dry] [--minutes N] [--only NAME,NAME] [--out FILE]
#
# PYTHON names another interpreter than python3. It needs torch, numpy, safetensors and pyyaml; transformers for the baselines.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" benchmarks/gpu_suite.py "$@"
