"""The posteriors that have reference draws, each with its model.

Convention of these models: no plates; every site carries its own dimensions as event dimensions, so
under a caller's ``pyro.plate("particles", P, dim=-1)`` values are ``(P, *event_shape)``, the
log-density is ``(P,)``, and nothing but that plate is ever to the left.
"""

from __future__ import annotations

from collections.abc import Callable

import dynamics
import hierarchical
import mixtures_and_hmms as states
import regressions as reg
import time_series
from port import Port
from regressions import Data


def _flat(design: Callable[[Data], Data]) -> Port:
    return Port(reg.flat_regression, prepare=design)


def _half_cauchy(design: Callable[[Data], Data]) -> Port:
    return Port(reg.half_cauchy_regression, prepare=design)


_DRIVE = ("theta1", "theta2", "phi", "lambda")

PORTS: dict[str, Port] = {
    "arK-arK": Port(time_series.ar, ("alpha", "beta", "sigma"), time_series.lagged),
    "arma-arma11": Port(time_series.arma11, ("mu", "phi", "theta", "sigma")),
    "bball_drive_event_0-hmm_drive_0": Port(states.hmm_drive_0, _DRIVE),
    "bball_drive_event_1-hmm_drive_1": Port(states.hmm_drive_1, _DRIVE),
    "diamonds-diamonds": Port(reg.brms_regression, ("b", "Intercept", "sigma"), reg.diamonds),
    "earnings-earn_height": _flat(reg.earn_height),
    "earnings-log10earn_height": _flat(reg.log10earn_height),
    "earnings-logearn_height": _flat(reg.logearn_height),
    "earnings-logearn_height_male": _flat(reg.logearn_height_male),
    "earnings-logearn_interaction": _flat(reg.logearn_interaction),
    "earnings-logearn_logheight_male": _flat(reg.logearn_logheight_male),
    "eight_schools-eight_schools_noncentered": Port(
        hierarchical.eight_schools_noncentered,
        ("theta", "mu", "tau"),
        to_latents=hierarchical.theta_trans,
    ),
    "gp_pois_regr-gp_pois_regr": Port(
        hierarchical.gp_pois_regr, ("rho", "alpha", "f"), to_latents=hierarchical.f_tilde
    ),
    "hmm_example-hmm_example": Port(states.hmm_example, ("theta1", "theta2", "mu")),
    "hudson_lynx_hare-lotka_volterra": Port(dynamics.lotka_volterra, ("theta", "z_init", "sigma")),
    "kidiq-kidscore_interaction": _half_cauchy(reg.kidscore_interaction),
    "kidiq-kidscore_momhs": _half_cauchy(reg.kidscore_momhs),
    "kidiq-kidscore_momhsiq": _half_cauchy(reg.kidscore_momhsiq),
    "kidiq-kidscore_momiq": _half_cauchy(reg.kidscore_momiq),
    "kidiq_with_mom_work-kidscore_interaction_c": _flat(reg.kidscore_interaction_c),
    "kidiq_with_mom_work-kidscore_interaction_c2": _flat(reg.kidscore_interaction_c2),
    "kidiq_with_mom_work-kidscore_interaction_z": _flat(reg.kidscore_interaction_z),
    "low_dim_gauss_mix-low_dim_gauss_mix": Port(states.low_dim_gauss_mix, ("mu", "sigma", "theta")),
    "mesquite-logmesquite": _flat(reg.logmesquite),
    "mesquite-logmesquite_logva": _flat(reg.logmesquite_logva),
    "mesquite-logmesquite_logvas": _flat(reg.logmesquite_logvas),
    "mesquite-logmesquite_logvolume": _flat(reg.logmesquite_logvolume),
    "mesquite-mesquite": _flat(reg.mesquite),
    **{f"nes{year}-nes": _flat(reg.nes) for year in (*range(1972, 1993, 4), 2000)},
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": Port(
        dynamics.one_comp_mm_elim_abs, ("k_a", "K_m", "V_m", "sigma")
    ),
    "sblrc-blr": Port(reg.normal_regression, prepare=reg.blr),
}
