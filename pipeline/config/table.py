"""The commands: what each is configured with, and the stage that runs it; where the built-in YAML lies."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore

from pipeline.stages.bench_options import (
    BenchCacheConfig,
    BenchCodecConfig,
    BenchExtractConfig,
    BenchShareConfig,
    BenchTrainConfig,
)
from pipeline.stages.circuit_options import CircuitsConfig, WeightsConfig
from pipeline.stages.export_options import ExportConfig, ImportConfig
from pipeline.stages.features_options import FeaturesConfig
from pipeline.stages.graph_options import GraphConfig
from pipeline.stages.intervene_options import InterveneConfig
from pipeline.stages.options import (
    CompareConfig,
    ConvertConfig,
    EvalConfig,
    ExtractConfig,
    GenerateConfig,
    PretrainConfig,
    ReportConfig,
    TrainConfig,
)
from pipeline.stages.plan_options import BenchDistConfig, PlanConfig
from pipeline.stages.plot_options import PlotConfig

Config = (
    PretrainConfig
    | ExtractConfig
    | TrainConfig
    | PlanConfig
    | EvalConfig
    | GenerateConfig
    | GraphConfig
    | InterveneConfig
    | FeaturesConfig
    | WeightsConfig
    | CircuitsConfig
    | PlotConfig
    | ConvertConfig
    | CompareConfig
    | ExportConfig
    | ImportConfig
    | ReportConfig
    | BenchExtractConfig
    | BenchCacheConfig
    | BenchCodecConfig
    | BenchShareConfig
    | BenchTrainConfig
    | BenchDistConfig
)


WithoutCache = (
    PretrainConfig
    | GenerateConfig
    | InterveneConfig
    | CircuitsConfig
    | ExportConfig
    | ReportConfig
    | BenchCodecConfig
    | BenchDistConfig
)
"""Those with no cache in their settings."""


@dataclass(frozen=True)
class Stage:
    schema: type[Config]
    module: str
    """Imported when the stage runs; has `run(config) -> Path`."""
    all_speak: bool = False
    """Whether its ranks are parts that end one by one, and say so."""


STAGES = {
    "pretrain": Stage(PretrainConfig, "pipeline.stages.pretrain"),
    "extract": Stage(ExtractConfig, "pipeline.stages.extract", all_speak=True),
    "train": Stage(TrainConfig, "pipeline.stages.train"),
    "plan": Stage(PlanConfig, "pipeline.stages.plan"),
    "eval": Stage(EvalConfig, "pipeline.stages.evaluate"),
    "generate": Stage(GenerateConfig, "pipeline.stages.generate"),
    "graph": Stage(GraphConfig, "pipeline.stages.graph"),
    "intervene": Stage(InterveneConfig, "pipeline.stages.intervene"),
    "features": Stage(FeaturesConfig, "pipeline.stages.features"),
    "weights": Stage(WeightsConfig, "pipeline.stages.weights"),
    "circuits": Stage(CircuitsConfig, "pipeline.stages.circuits"),
    "plot": Stage(PlotConfig, "pipeline.stages.plot"),
    "convert": Stage(ConvertConfig, "pipeline.stages.convert"),
    "compare": Stage(CompareConfig, "pipeline.stages.compare"),
    "export": Stage(ExportConfig, "pipeline.stages.export"),
    "import": Stage(ImportConfig, "pipeline.stages.import_run"),
    "report": Stage(ReportConfig, "pipeline.stages.report"),
    "bench_extract": Stage(BenchExtractConfig, "pipeline.stages.bench_extract"),
    "bench_cache": Stage(BenchCacheConfig, "pipeline.stages.bench_cache"),
    "bench_codec": Stage(BenchCodecConfig, "pipeline.stages.bench_codec"),
    "bench_share": Stage(BenchShareConfig, "pipeline.stages.bench_share"),
    "bench_train": Stage(BenchTrainConfig, "pipeline.stages.bench_train"),
    "bench_dist": Stage(BenchDistConfig, "pipeline.stages.bench_dist"),
}


CONF = Path(__file__).resolve().parents[2] / "conf"
"""Where the built-in YAML lies in a checkout; in a wheel it is the package `pipeline.conf`."""


if spec := importlib.util.find_spec("pipeline.conf"):
    CONF = Path(next(iter(spec.submodule_search_locations or [str(CONF)])))


for _name, _stage in STAGES.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_stage.schema)
