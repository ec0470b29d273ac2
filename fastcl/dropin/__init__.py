"""Classes with the constructor and the call of those they replace, one module for each library.

    fastcl.dropin.open_clip                 ClipLoss, SigLipLoss
    fastcl.dropin.lightly                   NTXentLoss, DCLLoss, DCLWLoss
    fastcl.dropin.pytorch_metric_learning   NTXentLoss, SupConLoss, DistributedLossWrapper
    fastcl.dropin.sentence_transformers     MultipleNegativesRankingLoss

Changing one import line is all it takes; the libraries themselves are not needed. An argument that is not supported raises;
none is ignored. The loss is returned in float32 (float64 for float64 input), also for half-precision input.
"""
