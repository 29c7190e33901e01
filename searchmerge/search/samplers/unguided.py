"""Samplers that learn nothing, to compare others with."""

from optuna.samplers import BaseSampler, QMCSampler, RandomSampler

from searchmerge.search.sampler import SAMPLERS, SamplerSetting


@SAMPLERS.register("qmc")
def qmc(setting: SamplerSetting) -> BaseSampler:
    """Fill the space evenly, by a scrambled Sobol sequence that a resumed study continues."""
    return QMCSampler(seed=setting.seed, scramble=True)


@SAMPLERS.register("random")
def random(setting: SamplerSetting) -> BaseSampler:
    """Draw each parameter uniformly."""
    return RandomSampler(seed=setting.fresh_seed)
