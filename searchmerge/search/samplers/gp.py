"""A Gaussian process, for few trials."""

from optuna.samplers import BaseSampler, GPSampler

from searchmerge.search.sampler import SAMPLERS, SamplerSetting


@SAMPLERS.register("gp")
def gp(setting: SamplerSetting) -> BaseSampler:
    """Take scores as exact: the same plan always has the same."""
    return GPSampler(seed=setting.fresh_seed, deterministic_objective=True)
