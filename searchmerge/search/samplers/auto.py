"""The sampler of a study that names none."""

from optuna.samplers import BaseSampler

from searchmerge.search.sampler import SAMPLERS, SamplerSetting
from searchmerge.search.samplers.relay import RelaySampler

_MANY_TRIALS = 200  # from here on a Gaussian process costs more than it gains


@SAMPLERS.register("auto")
def auto(setting: SamplerSetting) -> BaseSampler:
    """Gaussian process for numbers, CMA-ES from the 200th trial on; TPE for mixed spaces.

    ``space: auto`` is searched in stages.
    """
    if setting.space.is_auto and setting.n_objectives == 1:
        return SAMPLERS["staged"](setting)
    is_long = setting.n_trials is None or setting.n_trials > _MANY_TRIALS
    if not setting.space.is_flat or (is_long and setting.n_objectives > 1):
        return SAMPLERS["tpe"](setting)
    if not is_long or len(setting.space.distributions()) < 2:
        return SAMPLERS["gp"](setting)
    return RelaySampler(SAMPLERS["gp"](setting), SAMPLERS["cma_es"](setting), _MANY_TRIALS)
