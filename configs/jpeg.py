# JPEG artefact removal, gray (colour: --in_chans=3), quality 40, SwinIR-M with window 7: the
# authors' recipe.
#
#   torchrun --nproc_per_node=8 train.py configs/jpeg.py \
#       --dataroot_gt=DIV2K,Flickr2K,BSD500,WED --val_gt=classic5
#
# The authors trained quality 30, 20 and 10 from 40: --quality=10 --pretrain_network=FILE, which
# halves the iterations and the lr. Published on classic5 (PSNR, gray, border 0): 10 30.27,
# 20 32.52, 30 33.73, 40 34.52 dB. Not trained here. It needs GPUs: on two CPU cores a step takes
# half a minute.
import numpy as np

name = lambda cfg: "jpeg_" + "-".join(f"{n:g}" for n in np.ravel(cfg.quality))  # 40, 10-40
degradation = "jpeg"
quality = 40
in_chans = 1
img_range = 255  # as the authors' files with windows of 7
gt_size = 126
batch_size = 8

embed_dim = 180
depths = (6, 6, 6, 6, 6, 6)
num_heads = (6, 6, 6, 6, 6, 6)
window_size = 7
mlp_ratio = 2

loss = "charbonnier"
lr = lambda cfg: 1e-4 if cfg.pretrain_network else 2e-4
total_iters = lambda cfg: 800_000 if cfg.pretrain_network else 1_600_000
milestones = lambda cfg: tuple(cfg.total_iters * n // 16 for n in (8, 12, 14, 15))
gamma = 0.5
