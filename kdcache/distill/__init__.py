"""Losses of a student: ground truth, and any number of terms towards teachers.

The total is alpha_E(t) L_E + alpha_F(t) L_F + sum over k of lambda_k(t) L_k(M_s(H_s), M_t(H_t)).
"""
