// All that a pair of rows is measured by, once their normalizers are known: any number of TERMS.
//
// The first phase reads the pair and sums exponentials (resident.cuh); the second one reads it
// again, from where the first one has put it, and sums terms (measures.cuh).

// Found out anew whenever it is needed: functions in between need all registers.
OUTLINED Share share_of(const Call& call, int64 item) { return Share(call, item); }
DEVICE double* results_of(const Call& call, const Share& share)
{
    return call.values + share.row * call.columns;
}
DEVICE bool leads(const Share& share) { return team_rank() == 0 && share.part == 0; }
DEVICE int64 shares_of(const Call& call)
{
    return call.count * (CLUSTER > 1 ? CLUSTER : call.parts);
}

KERNEL(THREADS, BLOCKS) two_phase(ARGUMENT Call call)
{
    // See one_pass.cu.
    constexpr bool WIDE = Entry<DTYPE_P>::size == 4 && Entry<DTYPE_Q>::size == 4;
    for (int64 item = block_index() * TEAMS + team_in_block(); item < shares_of(call);
         item += block_count() * TEAMS) {
        if (!is_read(call, share_of(call, item).row)) {
            const Share share = share_of(call, item);
            if (leads(share))
                fill<0>(results_of(call, share), NAN64);
            continue;
        }
        find_constants(call, share_of(call, item));
        if (call.phase == 1)
            continue;
        if (!row_constants(call).good()) {
            const Share share = share_of(call, item);
            if (leads(share))
                fill<0>(results_of(call, share), UNFINISHED);
            continue;
        }

        // As it is; then carrying along what y - x rounds off; then with delta out of C, and what
        // is left of that out of it.
        constexpr int PLAIN = 0, EXACTLY = 1, BALANCED = 2, LAST = 3;
        for (int attempt = WIDE || call.parts > 1 ? EXACTLY : PLAIN;; ++attempt) {
            if (attempt >= BALANCED) {
                if (team_rank() == 0)
                    row_constants(call).balance(UNIT * row_sums(call)[PLACE<SUM_D>]);
                team_barrier();
            }
            if (attempt == PLAIN)
                sum_terms<false>(call, share_of(call, item));
            else
                sum_terms<true>(call, share_of(call, item));
            const Share share = share_of(call, item);
            if (call.parts > 1) {
                double* states = call.states + share.row * call.parts * STATE;
                if (team_rank() == 0) {
                    for (int i = 0; i < NUMBERS; ++i)
                        states[share.part * STATE + SECOND + i] = row_sums(call)[i];
                }
                if (!is_last_part(call, share.row))
                    break;
                put_parts_together(call, share.row);
            }
            if (team_rank() == 0)
                row_verdict(call) = finish(call, share.row, attempt != PLAIN, nullptr, false);
            team_barrier();
            const Verdict verdict = row_verdict(call);
            if (verdict.again && attempt < LAST && call.parts == 1)
                continue;
            bool differ = false;
            if (verdict.least < UNDERFLOW)
                differ = PairOfRows(call, share.row, 0, call.width).differ();
            if (leads(share) || (team_rank() == 0 && call.parts > 1))
                finish(call, share.row, attempt != PLAIN, results_of(call, share), differ);
            break;
        }
    }
}
