"""A Gaussian process, for few trials."""

from optuna.samplers import BaseSampler, GPSampler

from searchmerge.search.sampler import SAMPLERS, SamplerSetting


@SAMPLERS.register("gp")
def gp(setting: SamplerSetting) -> BaseSampler:
    """Take scores for noisy: on other examples of a task the same plan has another."""
    return GPSampler(seed=setting.fresh_seed, deterministic_objective=False)
