"""Tree-structured Parzen estimators, for mixed and conditional spaces."""

from optuna.samplers import BaseSampler, TPESampler

from searchmerge.search.sampler import SAMPLERS, SamplerSetting


@SAMPLERS.register("tpe")
def tpe(setting: SamplerSetting) -> BaseSampler:
    """Model parameters together with one objective, one by one with several, as Optuna advises."""
    return TPESampler(seed=setting.fresh_seed, multivariate=setting.n_objectives == 1, group=False)
