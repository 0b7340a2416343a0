"""The defenses: one file each, one row here. Third parties add theirs by the entry point
`fltoolkit.defenses`."""

DEFENSES = {
    "adaptive-clip": "defenses.adaptive_clip:AdaptiveClip",
    "clip": "defenses.clip:Clip",
    "clip-layers": "defenses.clip_layers:ClipLayers",
    "correlated": "defenses.correlated:Correlated",
    "discrete-gaussian": "defenses.discrete_gaussian:DiscreteGaussian",
    "gaussian": "defenses.gaussian:Gaussian",
    "instahide": "defenses.instahide:InstaHide",
    "lightsecagg": "defenses.lightsecagg:LightSecAgg",
    "mixup": "defenses.mixup:Mixup",
    "mpc": "defenses.mpc:MPC",
    "normalise": "defenses.normalise:Normalise",
    "precode": "defenses.precode:Precode",
    "prune": "defenses.prune:Prune",
    "quantise": "defenses.quantise:Quantise",
    "randk": "defenses.randk:RandK",
    "secagg": "defenses.secagg:SecAgg",
    "sign": "defenses.sign:Sign",
    "skellam": "defenses.skellam:Skellam",
    "soft-clip": "defenses.soft_clip:SoftClip",
    "soteria": "defenses.soteria:Soteria",
    "subspace": "defenses.subspace:Subspace",
    "topk": "defenses.topk:TopK",
}
