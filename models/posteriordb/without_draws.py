"""The posteriors that have no reference draws, each with its model.

These models are one draw's, in plain Pyro: plates for rows and groups, discrete variables summed
out as in Stan's code.
"""

from __future__ import annotations

from functools import partial

import capture
import groups
import hidden
import item_response as items
import logistic
import radon
import rates
import regressions as reg
import structured
from port import Port, from_zero

_county = from_zero("county_idx")
_GLOBAL = ("mu_alpha", "sigma_alpha", "sigma_y")
_RADON = {
    "partially_pooled": (radon.partially_pooled, ("alpha", *_GLOBAL)),
    "variable_intercept": (radon.variable_intercept, ("alpha", "beta", *_GLOBAL)),
    "variable_slope": (
        radon.variable_slope,
        ("alpha", "beta", "mu_beta", "sigma_beta", "sigma_y"),
    ),
    "variable_intercept_slope": (
        radon.variable_intercept_slope,
        ("alpha", "beta", "mu_beta", "sigma_beta", *_GLOBAL),
    ),
    "hierarchical_intercept": (radon.hierarchical_intercept, ("alpha", "beta", *_GLOBAL)),
}


def _radon(where: str) -> dict[str, Port]:
    """The twelve models on one copy of the data."""
    both = ("alpha", "beta", "sigma_y")
    ports = {
        f"{where}-radon_pooled": Port(radon.pooled, both, _county),
        f"{where}-radon_county_intercept": Port(radon.county_intercept, both, _county),
    }
    for name, (model, parameters) in _RADON.items():
        for kind in ("centered", "noncentered"):
            fixed = partial(model, centered=kind == "centered")
            ports[f"{where}-radon_{name}_{kind}"] = Port(fixed, parameters, _county)
    return ports


_CUBIC = ("alpha", "beta1", "beta2", "beta3")
_SEEDS = ("alpha0", "alpha1", "alpha2", "alpha12")
_LATENT = ("alpha", "beta_free", "theta", "lambda_adj")
_CAPTURE = ("omega", "mean_p", "sigma", "eps_raw")
_VOTES = tuple(name for kind in groups.KINDS for name in (kind, f"sigma_{kind}"))
_HORSESHOE = ("beta0", "beta", "tau", "caux")
_VOTES_OF_STATES = (
    *("GP_region_std", "GP_state_std", "year_std", "state_std", "region_std", "mu", "tot_var"),
    *("prop_var", *(f"length_GP_{of}" for of in structured.WAVES)),
)
_DESIGNS = {
    "dist100": ("dist",),
    "dist100ars": ("dist", "arsenic"),
    "interaction": ("dist", "arsenic", "dist*arsenic"),
    "dae": ("dist", "arsenic", "educ"),
    "interaction_c": ("c_dist", "c_arsenic", "c_dist*c_arsenic"),
    "dae_c": ("c_dist", "c_arsenic", "c_dist*c_arsenic", "educ"),
    "daae_c": ("c_dist", "c_arsenic", "c_dist*c_arsenic", "assoc", "educ"),
    "dae_inter": (
        *("c_dist", "c_arsenic", "c_educ"),
        *("c_dist*c_arsenic", "c_dist*c_educ", "c_arsenic*c_educ"),
    ),
}
_WELLS = {
    f"wells_data-wells_{name}_model": Port(
        logistic.flat_logistic, ("alpha", "beta"), logistic.wells(*columns)
    )
    for name, columns in _DESIGNS.items()
}
_REGRESSIONS = {
    name: Port(reg.flat_regression, prepare=design)
    for name, design in (
        ("nes1996-nes", reg.nes),
        ("kidiq_with_mom_work-kidscore_mom_work", reg.kidscore_mom_work),
        ("earnings-logearn_interaction_z", reg.logearn_interaction_z),
        ("mesquite-logmesquite_logvash", reg.logmesquite_logvash),
        ("sesame_data-sesame_one_pred_a", reg.sesame),
    )
}

PORTS: dict[str, Port] = {
    **_radon("radon_mn"),
    **_radon("radon_all"),
    "radon_mod-radon_county": Port(
        radon.radon_county, ("a", "mu_a", "sigma_a", "sigma_y"), from_zero("county")
    ),
    "election88-election88_full": Port(
        groups.election88_full, ("beta", *_VOTES), from_zero(*groups.KINDS.values())
    ),
    "GLM_Poisson_Data-GLM_Poisson_model": Port(groups.glm_poisson, _CUBIC),
    "GLMM_Poisson_data-GLMM_Poisson_model": Port(groups.glmm_poisson, (*_CUBIC, "eps", "sigma")),
    "GLM_Binomial_data-GLM_Binomial_model": Port(groups.glm_binomial, ("alpha", "beta1", "beta2")),
    "GLMM_data-GLMM1_model": Port(
        groups.glmm1, ("alpha", "mu_alpha", "sd_alpha"), from_zero("obssite")
    ),
    "seeds_data-seeds_model": Port(groups.seeds, (*_SEEDS, "tau", "b")),
    "seeds_data-seeds_stanified_model": Port(groups.seeds_stanified, (*_SEEDS, "b", "sigma")),
    "seeds_data-seeds_centered_model": Port(groups.seeds_centered, (*_SEEDS, "c", "sigma")),
    "rats_data-rats_model": Port(
        groups.rats,
        ("alpha", "beta", "mu_alpha", "mu_beta", "sigma_y", "sigma_alpha", "sigma_beta"),
        from_zero("rat"),
    ),
    "surgical_data-surgical_model": Port(groups.surgical, ("mu", "sigmasq", "b")),
    "pilots-pilots": Port(
        groups.pilots,
        ("a", "b", "mu_a", "mu_b", "sigma_a", "sigma_b", "sigma_y"),
        from_zero("group_id", "scenario_id"),
    ),
    "irt_2pl-irt_2pl": Port(
        items.irt_2pl, ("sigma_theta", "theta", "sigma_a", "a", "mu_b", "sigma_b", "b")
    ),
    "sat-hier_2pl": Port(
        items.hier_2pl, ("theta", "xi1", "xi2", "mu", "tau"), from_zero("ii", "jj")
    ),
    "lsat_data-lsat_model": Port(items.lsat, ("alpha", "theta", "beta"), items.lsat_answers),
    "fims_Aus_Jpn_irt-2pl_latent_reg_irt": Port(
        items.two_parameters, _LATENT, items.with_covariates
    ),
    "timssAusTwn_irt-gpcm_latent_reg_irt": Port(items.partial_credit, _LATENT, items.with_steps),
    "science_irt-grsm_latent_reg_irt": Port(
        items.rating_scale, (*_LATENT, "kappa_free"), items.with_covariates
    ),
    "M0_data-M0_model": Port(capture.m0, ("omega", "p")),
    "Mt_data-Mt_model": Port(capture.mt, ("omega", "p")),
    "Mb_data-Mb_model": Port(capture.mb, ("omega", "p", "c")),
    "Mh_data-Mh_model": Port(capture.mh, _CAPTURE),
    "Mth_data-Mth_model": Port(capture.mth, _CAPTURE),
    "Mtbh_data-Mtbh_model": Port(capture.mtbh, (*_CAPTURE, "gamma")),
    "butterfly-multi_occupancy": Port(
        capture.multi_occupancy,
        ("alpha", "beta", "Omega", "rho_uv", "sigma_uv", "uv1", "uv2"),
    ),
    "Rate_1_data-Rate_1_model": Port(rates.rate_1, ("theta",)),
    "Rate_2_data-Rate_2_model": Port(rates.rate_2, ("theta1", "theta2", "delta")),
    "Rate_3_data-Rate_3_model": Port(rates.rate_3, ("theta",)),
    "Rate_4_data-Rate_4_model": Port(rates.rate_4, ("theta", "thetaprior")),
    "Rate_5_data-Rate_5_model": Port(rates.rate_3, ("theta",)),
    "Survey_data-Survey_model": Port(rates.survey, ("theta",)),
    **_WELLS,
    "wells_data-wells_dist": Port(logistic.wells_dist, ("beta",)),
    "nes_logit_data-nes_logit_model": Port(
        logistic.flat_logistic, ("alpha", "beta"), logistic.nes_logit
    ),
    "dogs-dogs": Port(logistic.dogs, ("beta",), logistic.shocks),
    "dogs-dogs_log": Port(logistic.dogs_log, ("beta",), logistic.shocks),
    "dogs-dogs_hierarchical": Port(logistic.dogs_hierarchical, ("a", "b"), logistic.shocks),
    "dogs-dogs_nonhierarchical": Port(
        logistic.dogs_nonhierarchical, ("mu_logit_ab", "sigma_logit_ab", "z"), logistic.shocks
    ),
    "ovarian-logistic_regression_rhs": Port(logistic.regularized_horseshoe, _HORSESHOE),
    "prostate-logistic_regression_rhs": Port(logistic.regularized_horseshoe, _HORSESHOE),
    "normal_2-normal_mixture": Port(hidden.normal_mixture, ("theta", "mu")),
    "normal_5-normal_mixture_k": Port(hidden.normal_mixture_k, ("theta", "mu", "sigma")),
    "low_dim_gauss_mix_collapse-low_dim_gauss_mix_collapse": Port(
        hidden.low_dim_gauss_mix_collapse, ("mu", "sigma", "theta")
    ),
    "hmm_gaussian_simulated-hmm_gaussian": Port(hidden.hmm_gaussian, ("pi1", "A", "mu", "sigma")),
    "iohmm_reg_simulated-iohmm_reg": Port(hidden.iohmm_reg, ("pi1", "w", "b", "sigma")),
    "traffic_accident_nyc-bym2_offset_only": Port(
        structured.bym2, ("beta0", "sigma", "rho", "theta", "phi"), from_zero("node1", "node2")
    ),
    "rstan_downloads-prophet": Port(
        structured.prophet, ("k", "m", "delta", "sigma_obs", "beta"), structured.changepoints
    ),
    "loss_curves-losscurve_sislob": Port(
        structured.loss_curves,
        ("omega", "theta", "LR", "mu_LR", "sd_LR", "loss_sd"),
        from_zero("cohort_id", "t_idx"),
    ),
    "soil_carbon-soil_incubation": Port(
        structured.soil_incubation, ("k1", "k2", "alpha21", "alpha12", "gamma", "sigma")
    ),
    "garch-garch11": Port(structured.garch11, ("mu", "alpha0", "alpha1", "beta1")),
    "state_wide_presidential_votes-hierarchical_gp": Port(
        structured.hierarchical_gp, _VOTES_OF_STATES, structured.HISTORY
    ),
    **_REGRESSIONS,
    "sblri-blr": Port(reg.normal_regression, prepare=reg.blr),
    "eight_schools-eight_schools_centered": Port(
        groups.eight_schools_centered, ("theta", "mu", "tau")
    ),
    "kilpisjarvi_mod-kilpisjarvi": Port(structured.kilpisjarvi, ("alpha", "beta", "sigma")),
    "dugongs_data-dugongs_model": Port(structured.dugongs, ("alpha", "beta", "lambda", "tau")),
    "gp_pois_regr-gp_regr": Port(structured.gp_regr, ("rho", "alpha", "sigma")),
}
