"""Gaussian posteriors over weights: Laplace approximations with the true Fisher.

    q(w) = N(mu, (N P)^-1),   P = F + (tau / N) I

mu are the trained weights, F the Fisher of the loss in nats per example, N the number of data, tau the prior
precision. Deploying w_hat instead of w ~ q raises the expected loss by

    R(w_hat) = 1/2 E_q[(w - w_hat)T P (w - w_hat)] = 1/2 (mu - w_hat)T P (mu - w_hat) + const   nats per example,

the risk of all later stages. Structures of P, with weights flattened from W[g, r, c]:

    diag      diag(F_ii + tau/N)                                                             diagonal.py
    kfac      (A + pi sqrt(tau/N) I) (x) (G + sqrt(tau/N)/pi I)                              kfac.py
    ekfac     (Q_A (x) Q_G) diag(lambda + tau/N) (Q_A (x) Q_G)T                              ekfac.py
    lowrank   diag(max(F_ii - sum_k U_ik^2, 0) + tau/N) + U UT                               lowrank.py

A structure is two classes, also outside this package: a `Laplace` that fits a layer and estimates its memory, and a
`LayerPosterior` with risk, draws and whitening. Modules that the structures share:

    base.py        the two base classes; settings; tau of one layer, or one for all
    evidence.py    tau by MacKay's fixed point
    factors.py     pi, damping by the prior, shrinkage
    store.py       `WhiteningStore`: whitenings for full-precision inputs, made once for allocation and rounding
"""

from bayesq.posterior.base import AUTO as AUTO
from bayesq.posterior.base import Laplace as Laplace
from bayesq.posterior.base import LayerPosterior as LayerPosterior
from bayesq.posterior.base import Posterior as Posterior
from bayesq.posterior.diagonal import Diagonal as Diagonal
from bayesq.posterior.diagonal import DiagonalPosterior as DiagonalPosterior
from bayesq.posterior.ekfac import Ekfac as Ekfac
from bayesq.posterior.ekfac import EkfacPosterior as EkfacPosterior
from bayesq.posterior.kfac import Kfac as Kfac
from bayesq.posterior.kfac import KroneckerPosterior as KroneckerPosterior
from bayesq.posterior.lowrank import LowRank as LowRank
from bayesq.posterior.lowrank import LowRankPosterior as LowRankPosterior
from bayesq.posterior.store import WhiteningStore as WhiteningStore
