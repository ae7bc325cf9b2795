"""What to see in each figure, in the order of the report; by a pattern of their names."""

CAPTIONS = {
    "figure1_*": "The idea, on one test image that PGD on the bare classifier has moved: copies of "
    "it take K Langevin steps each with noise of its own, all are classified, the logits averaged. "
    "Of the attacked images it is the one that the defense is surest of.",
    "evaluation": "Every attack on the defense, with a piecewise linear and a smooth energy: "
    "Algorithm 1's accuracy with its 95 % interval, and what fresh noise makes of the saved "
    "images. What gradients through the chain take from the accuracy under BPDA (identity) is "
    "what BPDA did not see.",
    "figure2_*": "The training's own persistent chains at some of its moments, and the same chains "
    "many steps later under the weights of that moment; above these, the mean change of U. Adam "
    "alone leaves long chains free to go elsewhere; SGD is to bring them back to what the training "
    "sees (the convergent energy).",
    "figure3_logits_*": "Mean logits over H replicas, drawn again and again, for an image that the "
    "defense gets right safely and one that it barely gets right. Where the two classes overlap, a "
    "verdict from so few replicas is partly chance.",
    "figure4_accuracy": "Accuracy over the length of the chain, with 95 % Wilson intervals. Does "
    "accuracy on natural images survive long chains? At K=0 there is no defense, and BPDA+EOT is "
    "not run.",
    "figure4_samples": "The same test images under both energies.",
    "figure4_energies": "Energy along these chains; bands hold 80 % of the images. Chains of a "
    "convergent energy reach one level from natural and from adversarial images, and stay there.",
    "figure5_radius": "Accuracy over the radius of the attack in both norms, with 95 % Wilson "
    "intervals. Adversarial training has seen the l_inf ball of the radius in the legend; the "
    "defense has seen no attack. At radius 0 stand the natural images. The findings compare both "
    "image by image.",
    "figure6_steps": "What each attack leaves after so many steps, and at its end the 95 % Wilson "
    "interval. A curve that still falls there says that more steps would break more images.",
    "figure6_replicas": "Algorithm 1 with more replicas for the attacker's gradients (left) and "
    "for the defender's verdicts (right), with 95 % Wilson intervals. In the paper the attack "
    "saturates at 20 to 30 replicas, and 150 of the defender are close to the most that more of "
    "them could give; where the intervals overlap, neither is to be seen here. Dotted: Tables 1-3.",
    "figure7_energies": "Energies of natural images, of the same images after PGD on the bare "
    "classifier, and of uniform noise. Attacked images lie higher, in the paper (eps = 8/255) "
    "marginally so; where the first two hardly overlap, a threshold on the energy would tell them.",
    "figure8_lyapunov": "How fast two chains with the same noise part that are held a small "
    "distance apart, over the strength of the noise, and what such chains end as. Above 0 they "
    "forget each other: chaos. Only a smooth energy has an exponent of its own. That of a "
    "piecewise linear one depends on the distance: it rises with it from 0, the limit, until the "
    "distance is as wide as the corners of the energy lie apart. Little noise oversaturates "
    "samples, much of it drowns them.",
    "figure9_distance": "Squared Frechet distance between training images and chains that start "
    "from them: those of a convergent energy should drift far more slowly. Dashed: as many test "
    "images, which no chain has touched; for an independent sample of the same distribution that "
    "is what chance leaves.",
    "figure10_*": "Time for Langevin steps with the energy of this work and with networks of the "
    "size of earlier ones, measured by `stochsec bench-networks` on the machine that is named.",
    "energy_*": "One energy: its training, the energies along long chains from three starts, the "
    "energies of images and chains, samples. Convergent means that long chains come to one level, "
    "that of the persistent chains and of the (noisy) training images, and still look like data.",
}
