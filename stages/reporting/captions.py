"""Captions of the figures by a pattern of their file names, in the order of the report."""

CAPTIONS = {
    "figure1_*": "The idea, on one test image after PGD on the bare classifier: copies of it take "
    "K Langevin steps with independent noise, all copies are classified, and their logits are "
    "averaged. Shown is the attacked image on which the defense is most certain.",
    "evaluation": "Every attack on the defense, with a piecewise linear and a smooth energy: "
    "accuracy under Algorithm 1 with its 95 % interval, and on the saved images under fresh noise. "
    "Where gradients through the chain lower the accuracy below that under BPDA (identity), BPDA "
    "overestimates the robustness.",
    "figure2_*": "The persistent chains of training at several batches (top), and the same chains "
    "many steps later under the weights of that batch (bottom), with the mean change of U. After "
    "Adam alone, long chains may drift away from the images that training sees; SGD should bring "
    "them back (the convergent energy).",
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
    "saturates at 20 to 30 replicas, and the defender gains little beyond 150. Where the intervals "
    "overlap, this run resolves neither effect. Dotted: Tables 1-3.",
    "figure7_energies": "Energies of natural images, of the same images after PGD on the bare "
    "classifier, and of uniform noise. Attacked images have higher energy, in the paper (eps = "
    "8/255) only marginally. Where the first two hardly overlap, a threshold on the energy would "
    "detect the attack.",
    "figure8_lyapunov": "The maximal Lyapunov exponent over the strength of the noise, from two "
    "chains with the same noise that are held a small distance apart, and final states of chains. "
    "Above 0 the two diverge: chaos. Only the exponent of a smooth energy is independent of that "
    "distance. With a piecewise linear energy it tends to 0 for small distances, and grows until "
    "the distance reaches the spacing of the energy's corners. Too little noise oversaturates "
    "samples, too much drowns them.",
    "figure9_distance": "Squared Frechet distance between training images and chains that start "
    "from them: those of a convergent energy should drift far more slowly. Dashed: the distance of "
    "as many unchanged test images; if they are an independent sample of the same distribution, "
    "this is the sampling error.",
    "figure10_*": "Time for Langevin steps with the energy of this work and with networks of the "
    "size of earlier ones, measured by `stochsec bench-networks` on the machine that is named.",
    "energy_*": "One energy: its training, the energies along long chains from three starts, the "
    "energies of images and chains, samples. Convergent means that long chains come to one level, "
    "that of the persistent chains and of the (noisy) training images, and still look like data.",
}
