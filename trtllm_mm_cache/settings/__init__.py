"""Settings of every role, as frozen pydantic models: one class a role, limits nested in it.

Each default is written here and nowhere else. A field is one command-line flag (`trtllm-mm-cache ROLE
--help` shows the descriptions below), wherever it is nested, and where Dynamo has a name for it, bears
Dynamo's name; `constant` marks values that are settings for the code and its tests, but that no operator
would change: they have no flag, and a reason instead. Engine settings are not here: they live in the YAML
file that `--extra-engine-args` names and belong to the engine.

Units: GB = 1024**3 bytes, MB = 1024**2 bytes, times in seconds.
"""

from trtllm_mm_cache.settings.base import (
    DEFAULT_ENCODE_ENDPOINT,
    DEFAULT_NAMESPACE,
    DEFAULT_PD_ENDPOINT,
    GB,
    MB,
    DiscoverySettings,
    EngineName,
    EvictionPolicyName,
    ImageFormat,
    LogLevel,
    RuntimeSettings,
    Seconds,
    Settings,
    constant,
)
from trtllm_mm_cache.settings.commands import AskSettings, ControlSettings, DropSettings, PlanSettings
from trtllm_mm_cache.settings.frontend import FrontendOptions, FrontendSettings
from trtllm_mm_cache.settings.media import ImageLimits, MediaSettings
from trtllm_mm_cache.settings.serve import ServeSettings
from trtllm_mm_cache.settings.tiers import TierSettings
from trtllm_mm_cache.settings.workers import (
    EncodeSettings,
    EngineSettings,
    PdOptions,
    PdSettings,
    WorkerSettings,
)

__all__ = [
    "DEFAULT_ENCODE_ENDPOINT",
    "DEFAULT_NAMESPACE",
    "DEFAULT_PD_ENDPOINT",
    "GB",
    "MB",
    "AskSettings",
    "ControlSettings",
    "DiscoverySettings",
    "DropSettings",
    "EncodeSettings",
    "EngineName",
    "EngineSettings",
    "EvictionPolicyName",
    "FrontendOptions",
    "FrontendSettings",
    "ImageFormat",
    "ImageLimits",
    "LogLevel",
    "MediaSettings",
    "PdOptions",
    "PdSettings",
    "PlanSettings",
    "RuntimeSettings",
    "Seconds",
    "ServeSettings",
    "Settings",
    "TierSettings",
    "WorkerSettings",
    "constant",
]
