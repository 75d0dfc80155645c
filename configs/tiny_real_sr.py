# A small network for real-world super-resolution x2: photographs that are blurred, noisy and
# compressed. Ten minutes on two CPU cores.
#
#   python train.py configs/tiny_real_sr.py --dataroot_gt=photos --val_gt=testset
#
# For sharper, less faithful images, go on from its weights with a discriminator:
#
#   python train.py configs/tiny_real_sr.py --dataroot_gt=photos --val_gt=testset --name=gan \
#       --pretrain_network=experiments/tiny_real_sr/models/net_g_best.pth \
#       --loss=l1+0.05*gan --lr=1e-4
name = "tiny_real_sr"
scale = 2
degradation = "bsrgan"
gt_size = 80
batch_size = 4
num_workers = 1

embed_dim = 48
depths = (2, 2, 2)
num_heads = (1, 1, 1)
window_size = 8
mlp_ratio = 2
resi_connection = "3conv"
upsampler = "pixelshuffledirect"
drop_path_rate = 0.0  # stochastic depth slows short runs down
init_std = 0.1

loss = "l1"
lr = 1.5e-3
betas = (0.9, 0.99)
grad_clip = 0.05
scheduler = "cosine"
warmup_iters = 100
total_iters = 8000
discriminator_features = 16

crop_border = 2
save_img = True
print_freq = 400
val_freq = 2000
save_checkpoint_freq = 2000
