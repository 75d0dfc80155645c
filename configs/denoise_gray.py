# Gray denoising, Gaussian noise of sigma 25, SwinIR-M: the authors' recipe (KAIR's options).
#
#   torchrun --nproc_per_node=8 train.py configs/denoise_gray.py \
#       --dataroot_gt=DIV2K,Flickr2K,BSD500,WED --val_gt=Set12
#
# The authors trained sigma 25 and 50 from 15: --sigma=50 --pretrain_network=FILE, which halves the
# iterations and the lr. Published on Set12 (PSNR, gray, border 0): sigma 15 33.36, 25 31.01,
# 50 27.91 dB. Not trained here. It needs GPUs: on two CPU cores a step takes half a minute.
import numpy as np

name = lambda cfg: "denoise_gray" + "-".join(f"{n:g}" for n in np.ravel(cfg.sigma))  # 25, 0-50
degradation = "noise"
sigma = 25
in_chans = 1
gt_size = 128
batch_size = 8

embed_dim = 180
depths = (6, 6, 6, 6, 6, 6)
num_heads = (6, 6, 6, 6, 6, 6)
window_size = 8
mlp_ratio = 2

loss = "charbonnier"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 800_000 if cfg.pretrain_network else 1_600_000
milestones = lambda cfg: tuple(cfg.total_iters * n // 16 for n in (8, 12, 14, 15))
gamma = 0.5
