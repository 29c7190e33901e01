"""A genetic algorithm, for several objectives."""

from optuna.samplers import BaseSampler, NSGAIISampler

from searchmerge.search.sampler import SAMPLERS, SamplerSetting


@SAMPLERS.register("nsga2")
def nsga2(setting: SamplerSetting) -> BaseSampler:
    """Propose what crossing and mutating the best trials gives."""
    return NSGAIISampler(seed=setting.fresh_seed)
