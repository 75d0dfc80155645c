# Gray denoising, Gaussian noise of sigma 25, SwinIR-M: the authors' recipe (KAIR's options).
#
#   torchrun --nproc_per_node=8 train.py configs/denoise_gray.py --dataroot_gt=DIV2K,WED --val_gt=Set12
#
# They trained sigma 25 and 50 from 15: --sigma=50 --pretrain_network=FILE, which halves the iterations and
# the lr. Published on Set12 (PSNR, gray, border 0): sigma 15 33.36, 25 31.01, 50 27.91 dB. Not trained here.
# Measured: 36 s a step on two CPU cores (bfloat16), so 670 days: for GPUs, on which it was not run.
import numpy as np

name = lambda cfg: "denoise_gray" + "-".join(f"{n:g}" for n in np.ravel(cfg.sigma))  # 25, 0-50
degradation, sigma, in_chans = "noise", 25, 1
gt_size, batch_size = 128, 8
embed_dim, depths, num_heads, window_size, mlp_ratio = 180, (6,) * 6, (6,) * 6, 8, 2
loss = "charbonnier"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 800_000 if cfg.pretrain_network else 1_600_000
milestones, gamma = lambda cfg: tuple(cfg.total_iters * n // 16 for n in (8, 12, 14, 15)), 0.5
