// SPDX-License-Identifier: Apache-2.0

package maps

// PolicyVerdict is what an entry of a set says, as bpf/policy.h explains. PolicyAllow is all that sets of
// NetworkPolicies alone have.
type PolicyVerdict uint32

// TierAction is what a rule of a ClusterNetworkPolicy does.
type TierAction uint32

// Actions.
const (
	TierAccept TierAction = 0
	TierDeny   TierAction = 1
	TierPass   TierAction = 2
)

// Tier of ClusterNetworkPolicies, whose rules are a sequence.
type Tier uint32

// Tiers.
const (
	TierAdmin    Tier = 1
	TierBaseline Tier = 2
)

const (
	tierBits = 14
	tierMask = 1<<tierBits - 1

	policyAllowed  PolicyVerdict = 1 << 28
	policyIsolated PolicyVerdict = 1 << 29
	policyTiered   PolicyVerdict = 1 << 30

	// PolicyAllow lets the peer use the port.
	PolicyAllow PolicyVerdict = 1
	// PolicySilent is an entry of a set with tiers that says nothing.
	PolicySilent = policyTiered | tierMask | tierMask<<tierBits
	// TierRules is how many rules of a tier a set has room for. Their places count from 1; place 0 is for
	// a verdict that no rule has given.
	TierRules = tierMask>>2 - 1
)

// Allowed is v where a NetworkPolicy lets the peer pass, Isolated where one selects the pod.
func (v PolicyVerdict) Allowed() PolicyVerdict { return v | policyAllowed }

// Isolated is v where a NetworkPolicy selects the pod.
func (v PolicyVerdict) Isolated() PolicyVerdict { return v | policyIsolated }

// TierRule is what a rule alone says.
func TierRule(t Tier, place int, a TierAction) PolicyVerdict {
	field := PolicyVerdict(place<<2) | PolicyVerdict(a)
	if t == TierAdmin {
		return policyTiered | field | tierMask<<tierBits
	}
	return policyTiered | tierMask | field<<tierBits
}

// Join is tiers_join: what two entries that hold for the same packet say together.
func (v PolicyVerdict) Join(o PolicyVerdict) PolicyVerdict {
	const low, high PolicyVerdict = tierMask, tierMask << tierBits
	return min(v&low, o&low) | min(v&high, o&high) | (v|o)&^(low|high)
}

// Allows is tiers_allow, and what an entry without tiers says. rule is 0, or the tier and the place of the rule
// that denies, as events have it.
func (v PolicyVerdict) Allows() (allowed bool, rule uint32) {
	if v&policyTiered == 0 {
		return v != 0, 0
	}
	switch TierAction(v & 3) {
	case TierAccept:
		return true, 0
	case TierDeny:
		return false, uint32(TierAdmin)<<16 | uint32(v&tierMask)>>2
	}
	if v&policyIsolated != 0 {
		return v&policyAllowed != 0, 0
	}
	if baseline := uint32(v) >> tierBits & tierMask; TierAction(baseline&3) == TierDeny {
		return false, uint32(TierBaseline)<<16 | baseline>>2
	}
	return true, 0
}

// Tiers says which rule of each tier comes first; place 0 is none. tiered is false for PolicyAllow.
func (v PolicyVerdict) Tiers() (admin, baseline int, tiered bool) {
	place := func(field uint32) int {
		if field == tierMask {
			return 0
		}
		return int(field >> 2)
	}
	return place(uint32(v) & tierMask), place(uint32(v) >> tierBits & tierMask), v&policyTiered != 0
}

// LetByNetworkPolicy says whether a NetworkPolicy lets the peer pass, of a set with tiers.
func (v PolicyVerdict) LetByNetworkPolicy() bool { return v&policyAllowed != 0 }

// PolicyEntry is what a set says of a peer and port.
type PolicyEntry struct {
	Key     PolicyKey
	Verdict PolicyVerdict
}

// AnyRule stands for all policies of a set, whatever they say.
const AnyRule = 0xffffffff

// RuleOf takes an event's rule apart.
func RuleOf(rule uint32) (t Tier, place int) { return Tier(rule >> 16), int(rule & 0xffff) }

// Judge is set_allows: entry finds what a set says of a peer, or false; identities are those of the address in the
// scope of the set's epoch and of the set, 0 where it has none.
func Judge(entry func(peer uint32) (PolicyVerdict, bool, error), identities ...uint32) (allowed bool, rule uint32, err error) {
	verdict, _, err := entry(PeerAny)
	if err != nil {
		return false, 0, err
	}
	for _, peer := range identities {
		if peer == 0 || verdict&policyTiered == 0 && verdict != 0 {
			continue
		}
		v, found, err := entry(peer)
		switch {
		case err != nil:
			return false, 0, err
		case found && verdict == 0:
			verdict = v
		case found:
			verdict = verdict.Join(v)
		}
	}
	allowed, rule = verdict.Allows()
	return allowed, rule, nil
}
