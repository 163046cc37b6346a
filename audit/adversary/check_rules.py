"""The table of all checks by identifier: title, level, criterion, limit, and what a failure means.

Levels: without the checks of level "trust" a robust accuracy is an upper bound only; a "note" is shown beside it; a
network that fails a "gate" is not ranked. `docs/attacks.md` documents every identifier.
"""

from audit.adversary.attack_checks import Rule

_NETWORK_RULES = (
    Rule(
        "gradient",
        "gradient",
        "trust",
        "the gradient to the pixels exists and is finite",
        "gradient-based attacks cannot run",
    ),
    Rule(
        "zero_margin_gradient",
        "zero gradient of the margin",
        "trust",
        "at a random start the gradient is zero for no image",
        "gradient masking: attacks on the margin stall",
    ),
    Rule(
        "zero_cross_entropy_gradient",
        "zero gradient of the cross-entropy",
        "trust",
        "at a random start the gradient is zero for at most {limit:.0%} of the images",
        "gradient masking or saturated logits: attacks on the cross-entropy stall",
        0.01,
    ),
    Rule(
        "gradient_slope",
        "slope",
        "trust",
        "finite differences are 1/2 to 2 times the gradient's prediction, for {limit:.0%} of the images",
        "the gradient is not that of the network's output",
        0.9,
    ),
    Rule(
        "local_linearity",
        "linearity",
        "note",
        "a step of eps / 4 gains 0.3 to 2 times the gradient's prediction, in the median image",
        "the loss is rugged inside the ball: gradient descent may stop early",
    ),
    Rule(
        "unbounded_attack",
        "unbounded attack",
        "trust",
        "50 steps break every image at l-inf 1/2, a radius that covers a grey image",
        "the attack misses adversarial images that exist",
    ),
    Rule(
        "logit_outputs",
        "logits",
        "note",
        "the outputs are not probabilities",
        "a softmax before the loss shrinks the gradient of the cross-entropy",
    ),
    Rule(
        "determinism",
        "determinism",
        "trust",
        "five forward passes differ by less than {limit:g} of the logits' length",
        "the network is randomised, or its output for an image depends on the batch",
        1e-4,
    ),
)

_COMPARISON_RULES = (
    Rule(
        "single_step_attack",
        "single step",
        "note",
        "many steps break every image that one step breaks",
        "the iterative attack is weaker than a single step",
    ),
    Rule(
        "loss_agreement",
        "cross-entropy against margin",
        "note",
        "the two losses' robust accuracies differ by at most {limit:g}",
        "the gradient of one loss is masked",
        0.03,
    ),
    Rule(
        "rescaled_logits",
        "rescaled logits",
        "note",
        "rescaling the logits lowers the robust accuracy by at most {limit:g}",
        "the scale of the logits saturates the cross-entropy",
        0.01,
    ),
    Rule(
        "more_steps",
        "more steps",
        "note",
        "40 steps for 20 lower the robust accuracy by at most {limit:g}",
        "the attack has not converged",
        0.005,
    ),
    Rule(
        "loss_convergence",
        "settled loss",
        "note",
        "for {limit:.0%} of the survivors the best loss rises by at most 0.05 in the last 10 steps",
        "the attack has not converged",
        0.95,
    ),
    Rule(
        "more_restarts",
        "more restarts",
        "note",
        "5 restarts for 1 lower the robust accuracy by at most {limit:g}",
        "the attack depends on its random starts",
        0.005,
    ),
    Rule(
        "random_noise",
        "random noise",
        "note",
        "random changes of length eps break no image that the attack does not",
        "gradients miss images that noise finds",
    ),
    Rule(
        "gradient_free_attack",
        "gradient-free attack",
        "trust",
        "a gradient-free attack breaks at most {limit:g} of the images anew",
        "gradient masking: the gradient-based attacks are too weak",
        0.002,
    ),
    Rule(
        "transfer_attack",
        "transfer",
        "trust",
        "adversarial images of a similar network break no image that the attack does not",
        "gradient masking: the white-box attack is weaker than a transferred one",
    ),
    Rule(
        "eps_monotonicity",
        "eps ladder",
        "note",
        "the robust count never rises with eps",
        "the attack is too weak at the larger radius",
    ),
    Rule(
        "unbounded_eps",
        "end of the eps ladder",
        "note",
        "no image is robust at a radius that covers a grey image",
        "the attack misses adversarial images that exist",
    ),
)

# searches of other lengths and radii end elsewhere: a fall of three quarters counts as equal
_WORST_CASE_RULES = (
    Rule(
        "worst_case_gradient",
        "worst case: gradient",
        "trust",
        "the gradient to the pixels exists and is finite",
        "the worst-case search cannot run",
    ),
    Rule(
        "worst_case_zero_gradient",
        "worst case: zero gradient",
        "trust",
        "at a random start the gradient is zero for no image",
        "the worst-case search stalls",
    ),
    Rule(
        "worst_case_slope",
        "worst case: slope",
        "trust",
        "finite differences are 1/2 to 2 times the gradient's prediction, for {limit:.0%} of the images",
        "the gradient is not that of the search's objective",
        0.9,
    ),
    Rule(
        "worst_case_more_steps",
        "worst case: more steps",
        "note",
        "the mean falls at least {limit:g} times as far in eight steps as in two",
        "the worst-case search is too weak",
        0.75,
    ),
    Rule(
        "worst_case_wider_ball",
        "worst case: wider ball",
        "note",
        "the mean falls at least {limit:g} times as far within eps as within eps / 2",
        "the worst-case search is too weak at the larger radius",
        0.75,
    ),
)

_GATE_RULES = (
    Rule(
        "pixel_scale",
        "pixels",
        "gate",
        "pixels lie in [0, 1], and rescaling them improves accuracy by at most {limit:.0%}",
        "the images have another range or normalisation than in training",
        0.1,
    ),
    Rule(
        "finite_activations",
        "finite activations",
        "gate",
        "every activation is finite",
        "weights or inputs overflow",
    ),
    Rule(
        "score_outputs",
        "scores",
        "gate",
        "the outputs are not probabilities",
        "the network ends in a softmax, where logits are expected",
    ),
    Rule(
        "repeated_passes",
        "repeated passes",
        "gate",
        "three forward passes differ by at most {limit:g} of the logits' length",
        "the forward pass is random",
        1e-5,
    ),
    Rule(
        "eval_mode",
        "eval mode",
        "gate",
        "forward passes change no buffer, no parameter and no module's eval mode",
        "the network changes while it is measured",
    ),
    Rule(
        "batch_independence",
        "each image alone",
        "gate",
        "other images in the batch move logits by at most {limit:g} of their length",
        "the output for an image depends on the batch",
        2e-3,
    ),
    Rule(
        "label_order",
        "labels",
        "gate",
        "accuracy is at least twice chance, and renaming the classes improves it by at most {limit:.0%}",
        "the classes are in another order, or the data set is another one",
        0.1,
    ),
    Rule(
        "published_accuracy",
        "published accuracy",
        "gate",
        "the accuracy's interval reaches the published accuracy less {limit:.1%}",
        "weights, preprocessing or images differ from the published ones",
        0.005,
    ),
)

RULES: dict[str, Rule] = {
    rule.id: rule for rule in (*_NETWORK_RULES, *_COMPARISON_RULES, *_WORST_CASE_RULES, *_GATE_RULES)
}
