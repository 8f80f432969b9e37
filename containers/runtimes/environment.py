"""Choose which variables of the host enter a container, and which its runtime keeps.

A container gets the variables of the recipe and of amlaunch, those that tell a rank who it is, and those of the user's
shell that libraries inside read. Nothing else of the host enters: its search paths, modules and Python environments
name files that are not in the image.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""A valid variable name for a shell."""
RANK_VARIABLES = (
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_JOB_NODELIST", "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME", "SLURM_JOB_END_TIME", "SLURM_GPUS_ON_NODE",
    "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Variables that srun sets for each task. PMI's are not among them: ranks meet through torch, and a runtime would start
a server for PMI."""
LIBRARY_VARIABLES = (
    "NCCL_*", "UCX_*", "FI_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "TORCHINDUCTOR_*", "TRITON_*", "OMP_*", "MKL_*",
    "KMP_*", "NVTE_*", "CUBLAS_*", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER",
    "WANDB_*", "HF_*", "HUGGING_FACE_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "TOKENIZERS_*", "TIKTOKEN_*", "DATA_GYM_*",
    "MALLOC_*", "AMLAUNCH_*", "RAYON_*", "AWS_*", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY",
    "NO_PROXY", "SSL_CERT_FILE", "TZ",
)  # fmt: skip
"""Variables of the submitting shell that libraries inside the image read."""
SRUN_VARIABLES = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SLURM_*",
    "SLURMD_*",
    "SBATCH_*",
    "PYXIS_*",
    "ENROOT_*",
    "NVIDIA_*",
    "MELLANOX_*",
    "CUDA_VISIBLE_DEVICES",
)
"""Variables for srun and its container plugins; all of them are visible inside, too."""
RUNTIME_VARIABLES = (
    *SRUN_VARIABLES, "TMPDIR", "XDG_*", "DBUS_SESSION_BUS_ADDRESS", "APPTAINER_*", "SINGULARITY_*", "DOCKER_*",
    "CONTAINERS_*", "CONTAINER_HOST", "PODMAN_*", "STORAGE_DRIVER", "STORAGE_OPTS", "REGISTRY_AUTH_FILE", "BUILDAH_*",
    "CH_*", "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_*", "GOOGLE_*", "CLOUDSDK_*", "AZURE_*",
)  # fmt: skip
"""Variables for a runtime's own program and its credential helpers; it does not pass them on."""
STALE_VARIABLES = (
    "SLURM_EXPORT_ENV",
    "PYXIS_CONTAINER_*",
    "APPTAINERENV_*",
    "SINGULARITYENV_*",
    "APPTAINER_BIND*",
    "SINGULARITY_BIND*",
)
"""Variables left by a shell that was in a container or chose one; they would change ours."""
INTERPRETED_VARIABLES = (*RUNTIME_VARIABLES, "LD_*", "GCONV_PATH", "BASH_ENV", "ENV", "IFS")
"""Variables that the runtime's own program, or a shell that starts it, would obey itself."""
NAME_PREFIX = "AMLAUNCH_OF_RECIPE_"
"""Prefix of such variables on their way into a container."""


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that match a pattern, case-sensitively, sorted."""
    wanted = list(patterns)
    return sorted({name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)})


def library_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the host's variables that libraries inside read."""
    return {name: environ[name] for name in matching(environ, LIBRARY_VARIABLES)}


def runtime_variables(environ: Mapping[str, str], more: Iterable[str] = (), *, is_srun: bool = False) -> dict[str, str]:
    """Return the environment for a runtime's own program; it is small, because a runtime may pass on what it inherits.

    ``more``: names that a site adds. ``is_srun``: a plugin of srun starts the containers.
    """
    stale = set(matching(environ, STALE_VARIABLES))
    names = (*matching(environ, SRUN_VARIABLES if is_srun else RUNTIME_VARIABLES), *more)
    return {name: environ[name] for name in names if name in environ and name not in stale}


def prefixed(env: Mapping[str, str]) -> dict[str, str]:
    """Return a container's variables as the runtime's own program carries them in its environment.

    A variable that the program would obey itself gets a prefix until :func:`with_restored_names` removes it: podman
    keeps images below HOME, and a client asks a proxy for the daemon. In an argv the values, which may be secret, would
    be visible to all users of the node.
    """
    interpreted = _interpreted(env)
    return {f"{NAME_PREFIX}{name}" if name in interpreted else name: value for name, value in env.items()}


def with_restored_names(env: Mapping[str, str], command: Iterable[str]) -> list[str]:
    """Return the command to run inside: a shell first restores the names of variables that were :func:`prefixed`."""
    names = _interpreted(env)
    if not names:
        return list(command)
    exports = " ".join(f'{name}="${NAME_PREFIX}{name}"' for name in names)
    carriers = " ".join(f"{NAME_PREFIX}{name}" for name in names)
    return ["sh", "-c", f'export {exports}; unset {carriers}; exec "$@"', "sh", *command]


def _interpreted(env: Iterable[str]) -> list[str]:
    names = matching(env, INTERPRETED_VARIABLES)
    return [name for name in names if name not in RANK_VARIABLES and NAME.fullmatch(name)]
