"""Which variables of the host enter a container, and which the runtime itself is left with.

A container gets the recipe's and amlaunch's own variables, those that say who a
rank is, and those of the user's shell that libraries inside read. Nothing else
of the host: its search paths, modules and Python environments speak of files
that are not in the image.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""What a shell takes as a variable's name."""
RANK_VARIABLES = (
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_JOB_NODELIST", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME",
    "SLURM_JOB_END_TIME", "SLURM_GPUS_ON_NODE", "SLURM_STEP_GPUS", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""What srun says to each task. PMI's are not among them: ranks meet through torch, and a runtime would start a server for them."""
LIBRARIES = (
    "NCCL_*", "UCX_*", "FI_*", "GLOO_*", "TORCH_*", "PYTORCH_*", "TORCHINDUCTOR_*", "TRITON_*", "OMP_*", "MKL_*", "KMP_*", "NVTE_*", "CUBLAS_*", "CUDA_LAUNCH_BLOCKING",
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "WANDB_*", "HF_*", "HUGGING_FACE_*", "HUGGINGFACE_*", "TRANSFORMERS_*", "TOKENIZERS_*", "TIKTOKEN_*", "DATA_GYM_*",
    "MALLOC_*", "AMLAUNCH_*", "RAYON_*", "AWS_*", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "TZ",
)  # fmt: skip
"""Of the shell that submits: settings that libraries inside the image read."""
OF_SRUN = (
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
"""What srun needs, and the plugins that start containers for it; all of this is seen inside, too."""
OF_THE_RUNTIME = (
    *OF_SRUN, "TMPDIR", "XDG_*", "DBUS_SESSION_BUS_ADDRESS", "APPTAINER_*", "SINGULARITY_*", "DOCKER_*", "CONTAINERS_*",
    "CONTAINER_HOST", "PODMAN_*", "STORAGE_DRIVER", "STORAGE_OPTS", "REGISTRY_AUTH_FILE", "BUILDAH_*", "CH_*", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "AWS_*", "GOOGLE_*", "CLOUDSDK_*", "AZURE_*",
)  # fmt: skip
"""What the runtime's own program, and a helper that it asks for credentials, may need to know, and keeps to itself."""
STALE = (
    "SLURM_EXPORT_ENV",
    "PYXIS_CONTAINER_*",
    "APPTAINERENV_*",
    "SINGULARITYENV_*",
    "APPTAINER_BIND*",
    "SINGULARITY_BIND*",
)
"""Of a shell that was in a container, or chose one: it would join in."""
OF_PROGRAMS = (*OF_THE_RUNTIME, "LD_*", "GCONV_PATH", "BASH_ENV", "ENV", "IFS")
"""What means something to the runtime's own program, or to a shell that starts it."""
CARRIED = "AMLAUNCH_OF_RECIPE_"
"""Before the names of variables on their way into a container, where the runtime itself would heed them."""


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that fit one of the patterns, case and all, sorted."""
    wanted = list(patterns)
    return sorted({name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)})


def of_libraries(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the host's environment libraries inside are to know."""
    return {name: environ[name] for name in matching(environ, LIBRARIES)}


def of_runtime(environ: Mapping[str, str], more: Iterable[str] = (), *, is_srun: bool = False) -> dict[str, str]:
    """The environment of the runtime's own program: little, for what it inherits it may hand on.

    ``more``: names that a site adds; ``is_srun``: a plugin of srun starts containers.
    """
    stale = set(matching(environ, STALE))
    return {
        name: environ[name]
        for name in (*matching(environ, OF_SRUN if is_srun else OF_THE_RUNTIME), *more)
        if name in environ and name not in stale
    }


def carried(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set inside, as the runtime's own program has them in its environment.

    HOME is where podman has its images, a proxy is asked for the daemon: what it would heed itself bears another name
    until :func:`with_env`. In an argv they would be seen by everybody on the node, and any of them may hold a password.
    """
    aside = _aside(env)
    return {f"{CARRIED}{name}" if name in aside else name: value for name, value in env.items()}


def with_env(env: Mapping[str, str], command: Iterable[str]) -> list[str]:
    """The command, inside, once what was :func:`carried` there has its own names again."""
    names = _aside(env)
    if not names:
        return list(command)
    exports = " ".join(f'{name}="${CARRIED}{name}"' for name in names)
    return [
        "sh",
        "-c",
        f'export {exports}; unset {" ".join(f"{CARRIED}{name}" for name in names)}; exec "$@"',
        "sh",
        *command,
    ]


def _aside(env: Iterable[str]) -> list[str]:
    return [name for name in matching(env, OF_PROGRAMS) if name not in RANK_VARIABLES and NAME.fullmatch(name)]
