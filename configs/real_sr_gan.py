# Real-world super-resolution x4, SwinIR-M: the authors' GAN stage, from photographs alone. It
# starts from the weights of the PSNR stage, configs/real_sr.py.
#
#   torchrun --nproc_per_node=8 train.py configs/real_sr_gan.py --dataroot_gt=DIV2K,Flickr2K,OST
#
# VGG19's weights, for the perceptual loss, are downloaded. Images become sharper, and their PSNR
# falls: look at them, in visualization/. SwinIR-L: as in real_sr.py. Not trained here.
name = lambda cfg: f"real_sr_gan_x{cfg.scale}"
pretrain_network = lambda cfg: f"experiments/real_sr_x{cfg.scale}/models/net_g_best.pth"
scale = 4
degradation = "bsrgan"
gt_size = lambda cfg: 64 * cfg.scale
batch_size = 32

embed_dim = 180
depths = (6, 6, 6, 6, 6, 6)
num_heads = (6, 6, 6, 6, 6, 6)
window_size = 8
mlp_ratio = 2
upsampler = "nearest+conv"

loss = "l1+perceptual+0.1*gan"
vgg_layers = ("conv1_2:0.1", "conv2_2:0.1", "conv3_4", "conv4_4", "conv5_4")
gan_type = "vanilla"
lr = 1e-4
total_iters = 600_000
milestones = lambda cfg: tuple(cfg.total_iters * n // 24 for n in (16, 20, 22, 23, 24))
gamma = 0.5

crop_border = lambda cfg: cfg.scale
save_img = True
