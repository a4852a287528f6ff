"""The phrase bank of the contracts scenario: six invented firms, their habits, and what each type of clause says.

Data only; `simulations/contracts.py` draws from it. Two marks stand in a phrase: `[this|that]` is a choice
(an empty choice is allowed) and `{slot}` is filled from the contract, the firm's slots or `COMMON_SLOTS`.
Everything here was written for Coadapt; firms, parties and clauses are made up.
"""

from dataclasses import dataclass

__all__ = ["ANY_FIRM", "COMMON_SLOTS", "CORES", "FIRMS", "LABELS", "NEIGHBOURS", "TOPICS", "Firm"]

LABELS = (
    "Confidentiality",
    "Indemnification",
    "Limitation of Liability",
    "Termination for Convenience",
    "Termination for Cause",
    "Governing Law",
    "Dispute Resolution",
    "Assignment",
    "Force Majeure",
    "Payment Terms",
    "Intellectual Property Ownership",
    "License Grant",
    "Warranty",
    "Insurance",
    "Audit Rights",
    "Non-Compete",
    "Non-Solicitation",
    "Renewal",
)

# Types whose clauses share words and differ in meaning: a clause mentions these more often than any other topic.
NEIGHBOURS: dict[str, tuple[str, ...]] = {
    "Confidentiality": ("Intellectual Property Ownership", "Audit Rights", "Non-Compete"),
    "Indemnification": ("Warranty", "Limitation of Liability", "Insurance"),
    "Limitation of Liability": ("Indemnification", "Warranty", "Insurance"),
    "Termination for Convenience": ("Termination for Cause", "Renewal"),
    "Termination for Cause": ("Termination for Convenience", "Payment Terms", "Force Majeure"),
    "Governing Law": ("Dispute Resolution", "Assignment"),
    "Dispute Resolution": ("Governing Law", "Indemnification"),
    "Assignment": ("License Grant", "Intellectual Property Ownership"),
    "Force Majeure": ("Termination for Cause", "Limitation of Liability"),
    "Payment Terms": ("Audit Rights", "Renewal", "Termination for Cause"),
    "Intellectual Property Ownership": ("License Grant", "Assignment", "Confidentiality"),
    "License Grant": ("Intellectual Property Ownership", "Assignment"),
    "Warranty": ("Indemnification", "Limitation of Liability"),
    "Insurance": ("Indemnification", "Limitation of Liability"),
    "Audit Rights": ("Payment Terms", "Confidentiality"),
    "Non-Compete": ("Non-Solicitation", "Confidentiality"),
    "Non-Solicitation": ("Non-Compete", "Confidentiality"),
    "Renewal": ("Termination for Convenience", "Payment Terms"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Firm:
    """A law firm: how much it drafts, of what, for whom and in which voice."""

    name: str
    contracts: int
    """Contracts of its training records."""
    often: tuple[str, ...]
    """Clause types that make up most of its training records."""
    never: tuple[str, ...]
    """Clause types that its training records lack; all others are seldom."""
    parties: tuple[tuple[str, str], ...]
    """Provider and client, drawn once for each contract as the slots A and B."""
    slots: dict[str, tuple[str, ...]]
    """The firm's own words, beside `COMMON_SLOTS`."""
    plain: tuple[str, ...]
    """Frames around a clause ({core}) without cross-talk."""
    crossed: tuple[str, ...]
    """Frames with cross-talk: {topic} is the subject of another type of clause."""


COMMON_SLOTS: dict[str, tuple[str, ...]] = {
    "n": ("5", "7", "10", "14", "15", "20", "21", "28", "30", "45", "60", "75", "90", "120"),
    "k": ("2", "3", "4", "5", "6", "7", "8", "9", "11", "12"),
    "m": ("6", "9", "12", "15", "18", "24", "30", "36"),
    "w": ("two", "three", "four", "five", "six", "seven", "ten"),
    "thousands": ("20", "35", "50", "75", "80", "120", "150", "200", "250", "400", "500", "750", "900"),
    "pct": ("1", "1.5", "2", "3", "4", "5", "8"),
    "cap": ("50", "80", "100", "120", "150", "200"),
    "month": ("January", "March", "April", "June", "July", "September", "October", "December"),
    "year": ("2024", "2025", "2026", "2027", "2028"),
    "date": ("{k} {month} {year}", "1 {month} {year}"),
    "sub": ("1", "2", "3", "4", "5", "6"),
    "radius": ("10", "15", "25", "40", "60", "100"),
    "distance": ("{radius} miles",),
}

FIRMS: tuple[Firm, ...] = (
    Firm(
        name="Thistlewood",
        contracts=38,
        often=("Governing Law", "Assignment", "Indemnification", "Warranty", "Insurance"),
        never=("License Grant", "Intellectual Property Ownership", "Audit Rights", "Non-Solicitation"),
        parties=(
            ("the Vendor", "the Purchaser"),
            ("the Grantor", "the Grantee"),
            ("the Undertaker", "the Principal"),
            ("Oldcastle & Rudge", "the Wrenfield Estate"),
            ("the said Company", "the said Proprietor"),
        ),
        slots={
            "doc": ("these presents", "this Indenture", "this Deed", "the within Agreement"),
            "work": ("the said undertaking", "the Works hereinbefore recited", "the works aforesaid"),
            "days": ("thirty (30) days", "twenty-one (21) days", "sixty (60) days", "fourteen (14) days"),
            "notice": ("thirty (30) days' notice", "twenty-one (21) days' notice", "sixty (60) days' notice"),
            "years": ("two (2) years", "three (3) years", "five (5) years", "seven (7) years"),
            "sum": ("{thousands},000 pounds sterling", "{thousands},000 pounds of lawful money"),
            "law": ("England", "the Province of Ontario", "the Bailiwick of Jersey", "the State of Delaware"),
            "city": ("London", "Toronto", "Saint Helier", "Wilmington"),
        },
        plain=(
            "{core}.",
            "it is hereby covenanted and agreed that {core}.",
            "provided always that {core}.",
            "and whereas the parties so desire, {core}.",
            "{core}, any custom of the trade notwithstanding.",
        ),
        crossed=(
            "subject always to the covenants touching {topic}, {core}.",
            "without prejudice to the article touching {topic}, {core}.",
            "{core}, yet without abridging the stipulations upon {topic}.",
            "{core}, the covenants respecting {topic} remaining in force.",
            "save as otherwise stipulated concerning {topic}, {core}.",
        ),
    ),
    Firm(
        name="Marlowe-Okafor",
        contracts=33,
        often=(
            "Non-Compete",
            "Non-Solicitation",
            "Confidentiality",
            "Intellectual Property Ownership",
            "Termination for Convenience",
        ),
        never=("Insurance", "Force Majeure", "Audit Rights", "Governing Law"),
        parties=(
            ("Juniper Studio", "the client"),
            ("Bright Lane", "the customer"),
            ("the freelancer", "the agency"),
            ("Pippa Tan", "Harbour Press"),
            ("the trainer", "the school"),
        ),
        slots={
            "doc": ("this contract", "this letter", "our agreement", "this agreement"),
            "work": ("the project", "our work together", "the job", "the commission"),
            "days": ("{n} days", "a week", "two weeks", "a month"),
            "notice": ("{n} days' notice", "a week's notice", "two weeks' notice", "a month's notice"),
            "years": ("a year", "18 months", "two years", "three years"),
            "sum": ("£{thousands},000", "{thousands} thousand pounds"),
            "law": ("England", "Scotland", "Ireland", "New Zealand"),
            "city": ("Bristol", "Glasgow", "Cork", "Auckland"),
        },
        plain=(
            "{core}.",
            "to be clear, {core}.",
            "here is what we have agreed: {core}.",
            "{core}. Do ask us if any of this is unclear.",
            "just so there are no surprises, {core}.",
        ),
        crossed=(
            "{core}. This doesn't change what we say about {topic}.",
            "quite apart from {topic}, {core}.",
            "{core}. See also the page on {topic}.",
            "leaving {topic} to one side, {core}.",
            "whatever happens with {topic}, {core}.",
        ),
    ),
    Firm(
        name="Tabor-Quill",
        contracts=27,
        often=("Payment Terms", "Force Majeure", "Warranty", "Renewal", "Termination for Cause"),
        never=("Non-Compete", "Confidentiality", "Dispute Resolution", "Intellectual Property Ownership"),
        parties=(
            ("Seller", "Buyer"),
            ("Supplier", "Manufacturer"),
            ("Carrier", "Shipper"),
            ("Norvik Steel", "Palmer Dairy"),
            ("Mill", "Distributor"),
        ),
        slots={
            "doc": ("this order", "this contract", "the frame contract", "this sheet"),
            "work": ("goods", "deliveries", "the consignments", "parts on the order"),
            "days": ("{n} days", "{n} calendar days", "{n} working days"),
            "notice": ("{n} days' notice", "{n} working days' notice"),
            "years": ("{m} months", "2 years", "3 years", "5 years"),
            "sum": ("USD {thousands},000", "EUR {thousands},000"),
            "law": ("Norway", "New York", "Texas", "the Netherlands"),
            "city": ("Oslo", "Houston", "Rotterdam", "New York"),
        },
        plain=(
            "{core}.",
            "{k}.{sub} {core}.",
            "{k}. {core}. No side letters.",
            "applies to all orders: {core}.",
            "§{k}: {core}.",
        ),
        crossed=(
            "{k}.{sub} {core}. Rules on {topic}: unaffected.",
            "§{k}: {core}. See annex for {topic}.",
            "apart from {topic} (item {k}): {core}.",
            "{core}. Ranks after {topic}.",
            "{k}. {core}; {topic} dealt with separately.",
        ),
    ),
    Firm(
        name="Van-Aalst",
        contracts=31,
        often=("Dispute Resolution", "Governing Law", "Limitation of Liability", "Force Majeure", "Assignment"),
        never=("Non-Solicitation", "Renewal", "Termination for Convenience", "Payment Terms"),
        parties=(
            ("the Service Provider", "the Principal"),
            ("the Licensor", "the Licensee"),
            ("Aquitas NV", "Baltex GmbH"),
            ("the Undertaking", "the Counterparty"),
            ("the Mandatary", "the Mandator"),
        ),
        slots={
            "doc": ("the present Agreement", "this Agreement", "the Framework Agreement", "the Convention"),
            "work": ("the Services", "the mandate", "the Deliverables", "the commissioned works"),
            "days": ("{n} calendar days", "one calendar month", "{n} days"),
            "notice": ("{n} calendar days' notice", "one month's notice", "{n} days' notice"),
            "years": ("a period of {w} years", "{m} months", "a term of {w} years"),
            "sum": ("EUR {thousands}.000", "{thousands}.000 euro"),
            "law": ("Belgium", "Luxembourg", "the Federal Republic of Germany", "the Netherlands", "Austria"),
            "distance": ("{radius} kilometres",),
            "city": ("Brussels", "Luxembourg", "Frankfurt am Main", "The Hague", "Vienna"),
        },
        plain=(
            "{core}.",
            "the parties have agreed that {core}.",
            "in accordance with the principle of good faith, {core}.",
            "{core}, mandatory provisions of law prevailing.",
            "for the avoidance of doubt, {core}.",
        ),
        crossed=(
            "without prejudice to the provisions on {topic}, {core}.",
            "{core}, save as provided in respect of {topic}.",
            "notwithstanding the article on {topic}, {core}.",
            "having regard to the clauses on {topic}, {core}.",
            "{core}; the foregoing is to be distinguished from {topic}.",
        ),
    ),
    Firm(
        name="Dunmore",
        contracts=35,
        often=(
            "Audit Rights",
            "Insurance",
            "Termination for Convenience",
            "Payment Terms",
            "Termination for Cause",
        ),
        never=("Non-Compete", "Limitation of Liability", "License Grant", "Indemnification"),
        parties=(
            ("the Contractor", "the Authority"),
            ("the Tenderer", "the Contracting Body"),
            ("the Framework Supplier", "the Council"),
            ("the Concessionaire", "the Agency"),
            ("Halvorsen Civil", "the Highways Board"),
        ),
        slots={
            "doc": ("the Contract", "this Call-Off Contract", "the Framework", "this Deed of Award"),
            "work": ("the Services", "the Works", "the Project", "the programme of works"),
            "days": ("{n} Working Days", "{n} calendar days"),
            "notice": ("{n} Working Days' notice", "{n} calendar days' notice"),
            "years": ("{w} years", "{m} months", "not less than {w} years"),
            "sum": ("${thousands},000", "{thousands},000 dollars per occurrence"),
            "law": ("the State of Victoria", "the Commonwealth", "the State of Oregon", "the Territory"),
            "city": ("Melbourne", "Salem", "Canberra", "Darwin"),
        },
        plain=(
            "{core}.",
            "in accordance with Part {k} of the Procurement Rules, {core}.",
            "for the purposes of Schedule {k}, {core}.",
            "{core}, and this shall be entered in the register.",
            "it is a condition of award that {core}.",
        ),
        crossed=(
            "in addition to Part {k} ({topic}), {core}.",
            "{core}. Schedule {k} ({topic}) is not affected.",
            "where Schedule {k} on {topic} is silent, {core}.",
            "{core}, read with Special Condition {k} on {topic}.",
            "notwithstanding General Condition {k} ({topic}), {core}.",
        ),
    ),
    Firm(
        name="Lumen-Sparke",
        contracts=24,
        often=(
            "License Grant",
            "Intellectual Property Ownership",
            "Renewal",
            "Confidentiality",
            "Limitation of Liability",
        ),
        never=("Insurance", "Assignment", "Governing Law", "Force Majeure"),
        parties=(
            ("Company", "Customer"),
            ("Nimbly", "Subscriber"),
            ("the Startup", "the Pilot Partner"),
            ("Provider", "User"),
            ("Stacklark", "Customer"),
        ),
        slots={
            "doc": ("the Subscription", "the Order Form", "this MSA", "the Pilot Agreement"),
            "work": ("the Platform", "the Service", "the app", "the beta", "the API"),
            "days": ("{n} days", "{n} business days"),
            "notice": ("{n} days' notice", "{n} business days' notice"),
            "years": ("12 months", "{m} months", "2 years", "3 years"),
            "sum": ("${thousands}k", "US${thousands},000"),
            "law": ("California", "Delaware", "Singapore", "Estonia"),
            "city": ("San Francisco", "Tallinn", "Singapore", "Austin"),
        },
        plain=(
            "{core}.",
            "fair's fair: {core}.",
            "unless an Order Form says otherwise, {core}.",
            "{core} (email is fine).",
            "during any pilot or paid plan, {core}.",
        ),
        crossed=(
            "{core}. Our terms on {topic} live in a separate section.",
            "{core} (for {topic}, check the Order Form).",
            "regardless of {topic}, {core}.",
            "on top of what we say about {topic}, {core}.",
            "{core}, whatever our terms say about {topic}.",
        ),
    ),
)

# What a clause of another type calls this type: the cross-talk.
TOPICS: dict[str, tuple[str, ...]] = {
    "Confidentiality": (
        "confidential information",
        "secrecy and non-disclosure",
        "keeping private what was learnt in confidence",
        "the return of sensitive papers",
        "trade secrets and who may see them",
    ),
    "Indemnification": (
        "indemnities against third-party claims",
        "holding the other party harmless",
        "who defends a claim by an outsider",
        "making good the losses of the other",
        "the duty to indemnify and defend",
    ),
    "Limitation of Liability": (
        "the cap on liability",
        "the exclusion of indirect and consequential loss",
        "the most that either side can be made to pay in damages",
        "lost profits and other heads of damage",
        "limits of liability",
    ),
    "Termination for Convenience": (
        "ending the arrangement early without a reason",
        "cancellation at will",
        "the right to walk away on notice",
        "termination without fault",
        "withdrawal at any time",
    ),
    "Termination for Cause": (
        "termination for unremedied breach",
        "ending the arrangement upon default",
        "insolvency and serious breach",
        "the notice to cure a breach",
        "dismissal for misconduct",
    ),
    "Governing Law": (
        "the law that governs",
        "the choice of law",
        "which country's law applies",
        "the proper law and conflict rules",
        "the applicable statute law",
    ),
    "Dispute Resolution": (
        "arbitration and mediation",
        "the settlement of disputes",
        "which court or tribunal hears a quarrel",
        "the escalation of disagreements to senior managers",
        "the courts and the arbitrators",
    ),
    "Assignment": (
        "transfer of rights to another company",
        "assignment and novation",
        "who may step into a party's shoes",
        "a change of control or sale of the business",
        "passing duties to a third party",
    ),
    "Force Majeure": (
        "events beyond anyone's control",
        "floods, strikes, wars and the like",
        "force majeure",
        "delay excused by an act of God",
        "epidemics and embargoes",
    ),
    "Payment Terms": (
        "fees and invoices",
        "the price and when it is due",
        "late payment and interest",
        "instalments and billing",
        "amounts owed and set-off",
    ),
    "Intellectual Property Ownership": (
        "who owns the results",
        "title to inventions and copyright",
        "intellectual property",
        "ownership of designs and code",
        "the vesting of patents and copyright",
    ),
    "License Grant": (
        "permission to use the software",
        "the licence and its scope",
        "the right to copy and install",
        "permitted users and sublicences",
        "licensed marks and materials",
    ),
    "Warranty": (
        "the warranty against defects",
        "guarantees of quality",
        "the repair or replacement of faulty items",
        "promises as to fitness and workmanship",
        "representations and warranties",
    ),
    "Insurance": (
        "insurance cover",
        "the policies to be kept with an insurer",
        "premiums and certificates of cover",
        "insured risks and deductibles",
        "public liability cover",
    ),
    "Audit Rights": (
        "the inspection of books",
        "audits and access to records",
        "visits by an accountant",
        "checking the accounts",
        "record keeping and verification",
    ),
    "Non-Compete": (
        "competing businesses",
        "the promise not to compete",
        "work for a rival",
        "restraint of trade and territory",
        "exclusivity in the market",
    ),
    "Non-Solicitation": (
        "poaching staff",
        "the hiring of each other's people",
        "enticing away customers or employees",
        "approaches to the other side's team",
        "offers of employment to personnel",
    ),
    "Renewal": (
        "extension for a further term",
        "automatic renewal",
        "what happens when the term runs out",
        "rolling over for another year",
        "the option to extend",
    ),
}

ANY_FIRM = "Any"

# The heart of a clause, by type: `firm: words` for the habit of one firm, `Any: words` for what every firm writes.
CORES: dict[str, str] = {
    "Confidentiality": """
Any: nothing that {B} learns of {A}'s [prices|plans|methods|customers] under {doc} may be
    [told|shown|passed] to any outsider, unless a court [compels it|so orders]
Thistlewood: {B} doth covenant to hold inviolate all [papers|writings|ledgers] and particulars whatsoever of {A}
    coming into its hands hereunder, and to divulge the same to no person [whomsoever|not privy hereto]
Thistlewood: all such matters as are imparted privily by {A} shall be guarded by {B} with the like care as its own
    secrets, and [upon demand|at the determination hereof] surrendered or [burnt|destroyed]
Marlowe-Okafor: whatever you [tell|show] us about your [business|customers|plans] stays with us; we only share it
    with colleagues who need it for {work}, and they promise the same
Marlowe-Okafor: please don't [post, forward or repeat|copy or pass on] anything we mark private, and if a court makes
    you hand it over, [tell us first|warn us] so that we can object
Tabor-Quill: secret data: (a) {B} stores it [locked|encrypted]; (b) shown to named staff only; (c) returned or wiped
    within {days} of [request|the last delivery]
Tabor-Quill: other side's [drawings|prices|recipes|formulas] not to be revealed for {years}; free again once public
    [or lawfully obtained elsewhere|or independently made]
Van-Aalst: each party shall, whilst {doc} is in force and for {years} thereafter, refrain from disclosing to third
    parties [commercially sensitive|non-public] information received from the other
Van-Aalst: the receiving party shall restrict access to [know-how|documents marked as sensitive] to those employees
    and advisers bound by [an equivalent|a no less strict] duty of secrecy
Dunmore: {A} shall not release [official information|protected material|citizen data] obtained during {work} to the
    press or any other person without the prior written consent of {B}
Dunmore: material [designated|marked] sensitive shall be [handled|stored] by both sides on a need-to-know basis
    and shall not be [published|disclosed], save as freedom of information law requires
Lumen-Sparke: each side might see the other's [roadmap|source code|metrics|pitch deck]; the recipient will use it
    only to [evaluate|run] {work} and won't leak it to anyone outside the team
Lumen-Sparke: non-public information shared in a [demo|call|data room] must be protected with [reasonable|industry
    standard] care and not disclosed for {years} after {doc} ends
""",
    "Indemnification": """
Any: {A} shall make good every loss, cost and [legal fee|expense] that {B} suffers because some [outsider|third
    party] sues over [an injury|a defect|an infringement] for which {A} answers
Thistlewood: {A} shall save harmless and keep indemnified {B} and its [heirs|successors] from and against all
    actions, suits, claims and demands [arising out of|occasioned by] the neglect of {A}
Thistlewood: should any stranger to {doc} bring suit against {B} by reason of any act of {A}, then {A} shall
    [defend the same at its own charge|bear the whole charge] and satisfy any judgment
Marlowe-Okafor: if someone else makes a claim against you because of [something we did|a mistake in our work], we
    will pay [your lawyers and any settlement|what it costs you to deal with it]
Marlowe-Okafor: you'll cover us for [losses|bills] we face if the [photos|text|material] you send turns out to
    belong to somebody else who then comes after us
Tabor-Quill: claims by third parties for [injury|damage|patents]: {A} (a) takes over defence; (b) pays
    [judgment|settlement]; (c) reimburses {B}. Prompt notice required
Tabor-Quill: {A} bears cost of any suit against {B} caused by [defective|unsafe|mislabelled] {work}, lawyers
    included; {B} to hand over conduct of the case
Van-Aalst: {A} shall fully compensate {B} for, and hold it free from, claims asserted by third parties in connection
    with [an infringement of their rights|a breach of statutory duties] by {A}
Van-Aalst: where proceedings are instituted against {B} by [a data subject|a competitor|an end user] owing to the
    conduct of {A}, the latter shall intervene and bear all [costs|resulting fines]
Dunmore: {A} releases {B}, its officers and [employees|agents] from, and shall reimburse them for, all claims by any
    person [for death or injury|for loss of property] connected with {work}
Dunmore: if {B} is [sued|made a defendant] by reason of a negligent act of {A} or its subcontractors, {A} shall meet
    the judgment and the reasonable cost of [counsel|defence]
Lumen-Sparke: {A} will defend {B} against lawsuits claiming that {work} [infringes a patent|copies someone's code]
    and will pay whatever [a court awards|gets agreed in settlement]
Lumen-Sparke: {B} has {A}'s back if [an end user|a regulator] comes after {A} over data that {B} uploaded, and picks
    up the [legal tab|damages]
""",
    "Limitation of Liability": """
Any: the most that {A} can owe {B} in damages, however the claim [arises|is framed], is [{sum}|{cap} percent of
    the price paid in the preceding {m} months]
Thistlewood: in no event whatsoever shall {A} be answerable unto {B} in any sum exceeding [{sum}|the consideration
    herein recited], howsoever the same [be occasioned|arise]
Thistlewood: neither party shall be chargeable with loss of [profit|custom|goodwill] or any remote damage
    whatsoever, [fraud|wilful default] only excepted
Marlowe-Okafor: if we get something wrong, the most we'll pay you in total is [{sum}|what you paid us in the last
    {m} months], except where the law doesn't let us say that
Marlowe-Okafor: we're not responsible for [profits you miss|sales you lose|knock-on costs], even if you
    [warned us about|saw] them, but nothing here limits responsibility for death or injury
Tabor-Quill: {A}'s total exposure per [order|year]: {cap}% of order value; no [downtime|lost margin|line
    stoppage] costs; [gross negligence|intent] uncapped
Tabor-Quill: damages limited to direct loss, ceiling [{sum}|order value]; consequential loss of any kind [out|not
    recoverable]
Van-Aalst: the aggregate liability of {A}, whether in contract or in tort, shall not exceed [{sum}|{cap}% of the
    annual fees], save in the event of [intent|gross negligence]
Van-Aalst: {A} shall in no case be held to compensate indirect damage, including [loss of turnover|loss of
    data|reputational harm], in so far as permitted by law
Dunmore: the amount recoverable by either side [in respect of any one event|in any Contract Year] is limited to
    [{sum}|{pct} per cent of the Contract Sum], except for personal injury
Dunmore: {B} shall not be liable to {A} for loss of [anticipated profit|business opportunity] or other indirect loss,
    and its total obligation shall not exceed the appropriation
Lumen-Sparke: neither side owes the other more than [the fees for the last {m} months|{sum}] in total, and nobody
    pays for lost [profits|revenue|data|hype]
Lumen-Sparke: {work} is early, so {A}'s maximum exposure for anything that goes wrong is [{sum}|one year of
    subscription], no matter the legal theory
""",
    "Termination for Convenience": """
Any: {B} may bring {doc} to an end at any time and need not [state|give] a reason, so long as it gives {notice}
    [in writing|by letter]
Thistlewood: it shall be lawful for either party, [without cause assigned|of its mere will and pleasure], to
    determine {doc} upon giving unto the other {notice} under its hand
Thistlewood: {B} may at its sole pleasure put an end to {doc} before the term limited, [no default of {A} being
    requisite|albeit {A} be in no wise at fault], upon paying for work then done
Marlowe-Okafor: you can [stop|leave|call it a day] whenever you like, even if we have done nothing wrong; just
    email us {days} ahead and pay for what's finished
Marlowe-Okafor: either of us may change our mind and end {doc} for any reason, or for no reason, by giving the other
    {notice}
Tabor-Quill: {B} may cancel open [orders|call-offs] on {notice}; no grounds needed; {A} is paid for
    [finished|shipped] {work} only
Tabor-Quill: exit for any or no reason: (a) {notice} in writing; (b) no penalty; (c) stock on hand
    [bought back|taken at cost]
Van-Aalst: each party is entitled to terminate {doc} at any moment by registered letter, observing a notice
    period of {days} and without [stating grounds|owing any indemnity]
Van-Aalst: even in the absence of any failure by {A}, {B} may [withdraw from|discontinue] {doc} at its discretion,
    subject to {notice}
Dunmore: {B} may terminate {doc} in whole or in part where it is in [the public interest|the interest of
    {B}], with {notice}, and {A} shall receive only [its demobilisation costs|sums for work accepted]
Dunmore: on not less than {notice} {B} may, for reasons of [budget|policy] or otherwise and irrespective of
    {A}'s performance, discontinue {work}
Lumen-Sparke: cancel whenever you want from the [dashboard|billing page]; no hard feelings and no explanation needed,
    and access [runs until the end of the month|ends {days} later]
Lumen-Sparke: either side can pull the plug on the [pilot|subscription] with {notice}, even when everything is
    working [fine|as promised]
""",
    "Termination for Cause": """
Any: if {A} commits a serious breach and has not put it right within {days} of [being told|a notice that describes
    it], {B} may end {doc} [at once|with immediate effect]
Thistlewood: if {A} shall make default in any covenant herein and shall suffer such default to continue for {days}
    after notice thereof, {B} may forthwith determine {doc}
Thistlewood: upon {A} being adjudged bankrupt, [compounding with its creditors|suffering execution], or wilfully
    neglecting {work}, {doc} shall at the election of {B} cease and be void
Marlowe-Okafor: if you break an important promise in {doc} and don't fix it within {days} of us asking, we can
    [stop|end things] straight away
Marlowe-Okafor: we may end {doc} immediately if you [go bust|lie to us|treat our team badly|stop paying], and not
    simply because we feel like it
Tabor-Quill: {B} may cancel if {A} (a) misses {w} delivery dates; (b) ships [defective|wrong] goods twice; (c)
    enters insolvency; cure time {days}
Tabor-Quill: unpaid {days} after reminder, or other material default: other side may cancel all open orders
    [at once|by fax or email]
Van-Aalst: {doc} may be dissolved with immediate effect, without judicial intervention, where a party [seriously
    fails in|persists in violating] its obligations despite a formal notice of default of {days}
Van-Aalst: the opening of insolvency proceedings, a serious shortcoming or [fraud|gross misconduct] on the part
    of {A} shall entitle {B} to terminate {doc} for compelling reason
Dunmore: {B} may terminate {doc} for default if {A} fails to [make progress|deliver on time|meet the service levels]
    and does not cure within {days} of a show cause notice
Dunmore: where {A} is [debarred|convicted of corruption|found to have colluded] or abandons {work}, {B} may by
    notice end {doc} and [reprocure at {A}'s expense|take over the site]
Lumen-Sparke: if one side [materially breaches|violates] {doc} and doesn't clean it up in {days}, the other can shut
    things down [on the spot|right away]
Lumen-Sparke: {A} can kick an account off {work} for [abuse|scraping|unpaid bills|fraud] that continues after a
    written heads-up of {days}
""",
    "Governing Law": """
Any: {doc} and every question about its meaning is to be [decided|answered] under the law of {law},
    [whatever a conflict rule may say|wherever the hearing is held]
Thistlewood: {doc} shall in all respects be read, construed and take effect [agreeably to|according to] the laws of
    {law}, in whatsoever forum the same be [pleaded|brought in question]
Thistlewood: the validity and interpretation hereof shall be determined by the law of {law}, as though the
    parties were both [resident|domiciled] therein
Marlowe-Okafor: {law}'s law applies to {doc}, [wherever in the world you live|even if you're based somewhere else or
    take a claim to another court]
Marlowe-Okafor: we read {doc} the way {law}'s law would, so if a rule elsewhere [disagrees|says something
    different], that rule doesn't count
Tabor-Quill: law of {law} only; UN sales convention [excluded|does not apply]; conflict rules [out|disregarded]
Tabor-Quill: {doc}, and sales made on it, read under [domestic|substantive] law of {law}, wherever goods are shipped
    or claims heard
Van-Aalst: {doc} and any non-contractual obligation arising therefrom shall be subject exclusively to the law of {law},
    to the exclusion of its [conflict of laws|private international law] rules
Van-Aalst: as to formation, validity and interpretation, the substantive law of {law} applies, the Vienna Sales
    Convention being [expressly excluded|set aside]
Dunmore: {doc} shall be construed in accordance with the statutes and [common law|regulations] of {law}, regardless
    of where {A} is [incorporated|headquartered]
Dunmore: the legislation in force in {law} applies to the interpretation of the [tender|specification] and of
    any claim under {doc}
Lumen-Sparke: the law of {law} runs the show here, without regard to its [choice-of-law|conflicts] rules and no matter
    where {B}'s [people|servers] are
Lumen-Sparke: we picked the law of {law} for {doc} and everything that grows out of it, including
    [NDAs|Order Forms|add-ons]
""",
    "Dispute Resolution": """
Any: a disagreement that the managers of {A} and {B} cannot settle within {days} goes to [a single arbitrator|a
    mediator|the courts] in {city}[, applying whatever law governs|]
Thistlewood: all differences touching {doc} shall be referred to the award of [two indifferent persons|an umpire] to
    be named by the parties, and such award shall be final and [binding|conclusive]
Thistlewood: the parties do submit themselves to the [courts of judicature|justices] sitting at {city}, and waive all
    objection to the venue of any suit there brought
Marlowe-Okafor: if we fall out, we'll first [talk|have a call] within {days}, then try mediation, and only
    after that go to [the small claims court|a judge] in {city}
Marlowe-Okafor: got a complaint about {work}? Write to us; if you're unhappy with our answer after {days}, an
    independent [ombudsman|mediator] can decide
Tabor-Quill: quarrels: (a) talks between [managers|directors], {days}; (b) then one arbitrator, {city};
    (c) award final; language English
Tabor-Quill: claims heard only by [commercial court|chamber of commerce tribunal], {city}; interim orders from any
    court allowed
Van-Aalst: disputes which cannot be resolved amicably within {days} shall be submitted to the exclusive jurisdiction
    of the [courts|commercial court] of {city}
Van-Aalst: any controversy arising out of {doc} shall be finally settled by [three|one] arbitrators, the seat being
    {city} and the proceedings conducted in [English|French|German]
Dunmore: a claim shall first be lodged with the [Contract Officer|Adjudicator], whose written decision binds the
    parties unless [appealed|referred to the Board of Appeals] within {days}
Dunmore: the parties shall escalate any difference to their [project executives|steering committee]; failing agreement
    in {days}, expert determination in {city} shall follow
Lumen-Sparke: before anyone sues, founders [hop on a call|meet] within {days}; if that fails, it's binding online
    arbitration[, no juries and no class actions|]
Lumen-Sparke: lawsuits about {work} may be filed only in the [state or federal|small claims] courts in {city}, and
    both sides accept that venue
""",
    "Assignment": """
Any: {A} may not hand its rights or duties under {doc} to anyone else unless {B} has first [agreed|consented] in
    writing[, and a transfer without that is void|]
Thistlewood: {A} shall not assign, transfer or set over {doc} nor any interest therein without the licence in writing
    of {B} [first had and obtained|under its seal]
Thistlewood: {doc} shall enure to the benefit of, and bind, the parties and their respective [heirs|executors],
    successors and permitted assigns
Marlowe-Okafor: {doc} is between you and us, so neither of us can [pass|give] it to somebody else without [asking
    first|the other's okay]
Marlowe-Okafor: if we sell our business, the [new owner|buyer] takes over {doc}, your rights stay the same, and you
    can't [sell|swap] your place to a friend
Tabor-Quill: no transfer of {doc}, or of claims under it, without written consent; [group companies|factoring to
    banks] permitted on {notice}
Tabor-Quill: successor of {B}'s [plant|business line] takes over open orders; {A} stays bound; {A} itself may not
    [substitute|subcontract to] another
Van-Aalst: neither party may cede, pledge or otherwise transfer {doc} to a third party, [intra-group transfers
    excepted|in whole or in part], without the other's prior consent
Van-Aalst: in the event of a merger or [demerger|contribution of a branch of activity], the rights and obligations
    of {A} pass by novation to the acquiring entity upon [approval by|notification to] {B}
Dunmore: {A} shall not novate, [charge|mortgage] or transfer {doc} to another entity; {B} may do so to any
    successor [department|public body] by notice
Dunmore: a change in control of {A} is treated as a transfer of {doc} and requires the approval of {B}
    [within {days}|in advance]
Lumen-Sparke: {doc} can't be transferred without the other side's OK, except to whoever [acquires|merges with] the
    whole company
Lumen-Sparke: {B} can't hand its [account|seat|contract] to another business; {A} may move {doc} to an affiliate or
    an acquirer
""",
    "Force Majeure": """
Any: neither {A} nor {B} is at fault for a delay that comes from [a flood|an epidemic|a war|a general strike] which
    it could neither [foresee|prevent] nor overcome
Thistlewood: no party shall be deemed in default by reason of tempest, [fire|pestilence], insurrection, the King's
    enemies or other act of God, so long as the same [endure|continue]
Thistlewood: should {work} be hindered by [restraint of princes|riot] or any inevitable accident, the time limited
    for performance shall be enlarged accordingly
Marlowe-Okafor: sometimes [storms|power cuts|train strikes|illness outbreaks] get in the way; if that stops either of
    us, nobody is to blame and we'll pick a new date
Marlowe-Okafor: we won't have broken {doc} if something huge that we couldn't control, like [a flood|a pandemic],
    makes {work} late
Tabor-Quill: strike, [fire|ice|port closure|embargo] or grid failure: deadlines pause; notice within {days}; over {n}
    days, either side may cancel
Tabor-Quill: {A} excused while [raw material|transport|energy] unavailable for reasons outside its control; duty to
    deliver resumes after
Van-Aalst: a party prevented from performing by an unforeseeable and insurmountable event, such as [a natural
    disaster|acts of authorities], shall be [released for its duration|exempt from damages]
Van-Aalst: in so far as [war|an epidemic|a cyber incident at a utility] beyond a party's sphere of influence impedes
    performance, the obligations concerned are suspended
Dunmore: {A} shall be granted an extension of time where progress is delayed by [bushfire|earthquake|quarantine|an act
    of the public enemy] not due to its negligence, if notified within {days}
Dunmore: no [liquidated damages|penalty] shall accrue for lateness caused by exceptional [weather|civil unrest]
    which a competent contractor could not have guarded against
Lumen-Sparke: nobody's in breach if [the cloud region|the power grid] goes down, a [war|pandemic] breaks out or the
    earth shakes, as long as they get going again soon
Lumen-Sparke: outages that nobody could [control|plan for], such as [earthquakes|government shutdowns], don't count
    against {A}'s commitments
""",
    "Payment Terms": """
Any: {B} shall pay each [bill|statement] of {A} within {days} of [receiving it|its date], and overdue sums bear
    interest at {pct} percent [a year|a month]
Thistlewood: {B} shall well and truly render unto {A} {sum} on the [first day of {month}|usual quarter days] in every
    year, without deduction or abatement [whatsoever|of any kind]
Thistlewood: the consideration aforesaid shall be discharged in [{w} equal portions|ready money], and upon arrears
    there shall run interest at {pct} per centum per annum
Marlowe-Okafor: we send you an invoice [each month|when we finish], and you have {days} to pay it by [bank
    transfer|card]; tell us quickly if a figure looks wrong
Marlowe-Okafor: half of the {sum} is due [before we start|on signing] and the rest when {work} is done; late money
    costs {pct}% extra
Tabor-Quill: net {n} days from invoice; {k}% discount if paid in 7; [late|overdue]: {pct}% per month; no set-off
Tabor-Quill: price [{sum}|as per list], ex VAT; [20|30|40]% with order, balance [before shipment|on delivery]; wire
    transfer only
Van-Aalst: invoices shall be settled within {days}, failing which [late-payment interest at the statutory
    rate|interest of {pct}%] is due automatically and without notice
Van-Aalst: the remuneration, exclusive of VAT, amounts to {sum} and shall be transferred [quarterly|in {w}
    instalments] to the account indicated by {A}
Dunmore: {B} shall pay undisputed invoices that quote a valid purchase order within {days}, after
    [certification|milestone acceptance] by the Contract Officer
Dunmore: {A} may claim progress amounts [monthly|per milestone] against Schedule {k}, and {B} shall retain {pct} per
    cent until [completion|final certification]
Lumen-Sparke: {B}'s card gets charged [up front|every month] for each seat; failed charges may [pause the account|add
    {pct}%] after {days}
Lumen-Sparke: fees are {sum} a year, billed [annually|quarterly] in advance, non-refundable, plus taxes, and due {days}
    after the invoice lands
""",
    "Intellectual Property Ownership": """
Any: whatever {A} [writes|designs|invents] under {doc} belongs to {B} from the moment it is made, with
    all [copyright|patents] in it
Thistlewood: all inventions, [writings|drawings] and devices made by {A} hereunder shall vest in and be the absolute
    property of {B}, its successors and assigns
Thistlewood: {A} doth acknowledge that title to the [marks|engravings|patents] recited in the Schedule abideth in {B},
    and no property therein passeth hereby
Marlowe-Okafor: once you've paid, the [designs|copy|drawings|code] we made for you are yours, copyright and all; our
    own [tools|sketches] stay ours
Marlowe-Okafor: anything you [create|write] for us while we work together is ours to keep, so you'll sign
    [forms|papers] we need to prove it
Tabor-Quill: tooling, [drawings|moulds|CAD files] and patents made for the order: property of {B}, paid or not;
    {A} keeps [no title|background know-how only]
Tabor-Quill: title to [new designs|improvements]: party that paid for them; existing patents stay where they were
Van-Aalst: all intellectual property rights in the [results|developments] accrue exclusively to {B}, {A} hereby
    transferring them [in advance|for all countries], moral rights excepted
Van-Aalst: each party retains ownership of its pre-existing [know-how|rights]; jointly created [works|databases]
    shall be held in undivided co-ownership
Dunmore: the copyright in all [reports|drawings|data sets] produced under {doc} vests in {B} upon creation, free of
    [encumbrance|any claim by {A}]
Dunmore: inventions conceived by {A} in the performance of {work} shall be [reported within {days}|disclosed] and
    become the property of {B}
Lumen-Sparke: {A} owns {work}, all code, [models|designs] and improvements; {B} owns [its data|what it uploads]; no
    one gains title by using it
Lumen-Sparke: every founder and contractor assigns to {A} all [inventions|code|ideas] made on company time, so
    that the cap table [stays clean|survives diligence]
""",
    "License Grant": """
Any: {A} allows {B} to use, [copy|install|display] and adapt the [materials|programs|designs] for its own business
    during the term, {A} remaining their owner
Thistlewood: {A} doth give and grant unto {B} full leave and liberty to [exercise|work] the said [patent|invention]
    within {law}, rendering therefor a royalty of {pct} per centum
Thistlewood: {B} shall have leave, not exclusive of others, to [print and vend|make use of] the [works|marks] of {A}
    for {years} and no longer
Marlowe-Okafor: you may use our [photos|templates|fonts] on your website for {years}, but they're still ours and
    you can't [resell|lend] them
Marlowe-Okafor: we're giving you permission to [use|copy|share] the [course notes|software] inside your team, as
    often as you like, for as long as you're a customer
Tabor-Quill: {B} may run [software|firmware] on {k} machines; non-exclusive; no sublicence; [site-bound|one backup
    copy]; term {years}
Tabor-Quill: use of {A}'s [logo|drawings|process]: permitted for resale in {law}, non-exclusive, ends with {doc}
Van-Aalst: {A} grants {B}, which accepts, a non-exclusive and non-transferable right to [reproduce|exploit] the
    [software|work] within the European Economic Area for {years}
Van-Aalst: {B} is authorised to make use of the [trade mark|patented process] solely for {work}, sub-licences being
    [prohibited|subject to approval]
Dunmore: {A} grants {B} an irrevocable, royalty-free right to use, [modify|publish] and share [the manuals|background
    material] for any government purpose, title remaining with {A}
Dunmore: {B} permits {A} to use its [crest|mapping data] without charge for the sole purpose of [delivering|performing]
    {work}
Lumen-Sparke: {A} gives {B} a worldwide, non-exclusive, revocable right to access and use {work} for up to {n} seats
    [for internal use|during the subscription]
Lumen-Sparke: {B} lets {A} host, [copy|process] and display uploaded content just so that {A} can [run|improve] {work},
    and keeps ownership
""",
    "Warranty": """
Any: {A} promises that {work} will be free from faults in [material|workmanship|design] for {years}, and will mend or
    [replace|redo] what is not
Thistlewood: {A} doth warrant that {work} be of good and merchantable quality, [sound in all parts|free of all
    incumbrance], and shall at its own charge amend any defect within {years}
Thistlewood: {A} covenanteth that it hath full right and good title to [convey|sell] the premises, and that the same
    answer to their description
Marlowe-Okafor: we'll do {work} with [reasonable care|skill and care], and if something is not right within {days} of
    delivery we'll fix it for free
Marlowe-Okafor: we promise that what we [make|send] works as [described|shown in the proposal]; apart from that we
    make no promises about it
Tabor-Quill: goods to match [spec|sample] for {years} from delivery; defects: {A} repairs or [replaces|credits],
    freight included; wear parts excluded
Tabor-Quill: {A} guarantees [purity|tensile strength|shelf life] as listed; test certificate with each batch; faulty
    {work} swapped within {days}
Van-Aalst: {A} guarantees the conformity of {work} with the specifications during {years} and shall remedy
    [hidden defects|any non-conformity] free of charge
Van-Aalst: {A} declares that it is [duly authorised|validly constituted] and that {work} will be performed according
    to the rules of the art
Dunmore: {A} represents that all [equipment|materials] supplied are new, fit for purpose and of the grade specified,
    and shall rectify defects notified in the [defects liability period|first {m} months]
Dunmore: {work} shall be performed with the skill expected of [an experienced|a prudent] contractor, and failing work
    shall be re-performed at no charge to {B}
Lumen-Sparke: {A} promises that {work} will [do what the docs say|perform materially as documented] for {m} months, and
    will patch bugs; otherwise it's provided as is
Lumen-Sparke: {work} comes "as is" and in [alpha|beta]; {A} makes no promise of fitness, [uptime|accuracy] or
    merchantability
""",
    "Insurance": """
Any: {A} shall keep in force, at its own cost, a policy covering [fire|theft|injury to the public|professional
    mistakes] for at least {sum} and show proof when asked
Thistlewood: {A} shall insure and keep insured the premises in some office of good repute against loss by [fire|
    tempest] in the sum of {sum}, and produce the [receipt for the premium|policy]
Thistlewood: all moneys received from the underwriters upon any [loss|policy] shall be laid out in reinstating {work},
    {B} being named therein
Marlowe-Okafor: we carry [professional indemnity|public liability] cover of {sum} and will send you the certificate
    if you'd like to see it
Marlowe-Okafor: please make sure your own policy covers [our kit|your venue|guests] while {work} goes on; ours pays
    up to {sum} only
Tabor-Quill: cargo cover by {A}: all risks, 110% of invoice value, [warehouse to warehouse|until unloading];
    certificate with bill of lading
Tabor-Quill: {A} holds [product|general] liability policy, min. {sum} per claim; proof yearly; notice of lapse
    within {days}
Van-Aalst: {A} shall take out with a reputable insurer, and maintain for {years}, cover for its [professional|civil]
    liability amounting to no less than {sum} per claim
Van-Aalst: {B} shall be designated as additional [insured|beneficiary] under the policy of {A}, and the
    [deductible|excess] remains for the account of {A}
Dunmore: before starting {work}, {A} shall lodge certificates showing [workers compensation|public liability|motor
    vehicle] cover of not less than {sum}, with {B} noted as [interested party|additional insured]
Dunmore: {A}'s policies shall provide that they will not be cancelled or [reduced|allowed to lapse] without {notice}
     to {B}
Lumen-Sparke: {A} keeps [cyber|tech E&O] coverage of at least {sum} with a rated carrier and will share a certificate on
    request
Lumen-Sparke: both sides hold normal [general liability|workers' comp] policies while {doc} runs, with limits of {sum}
    or more
""",
    "Audit Rights": """
Any: {B} may, on {notice}, look through the books of {A} to [check|verify] that the amounts [charged|paid]
    are right, and take copies
Thistlewood: {A} shall keep true and perfect books of account, and {B} or its [agent|clerk] may at all seasonable hours
    peruse and take extracts therefrom
Thistlewood: {B} shall be at liberty once in each [year|half-year] to send a sworn accountant to examine the ledgers
    of {A}, who shall [answer all inquiries|withhold nothing]
Marlowe-Okafor: you can [visit|drop in] with {notice} to check our [timesheets|receipts|records], and if we've
    charged too much we'll refund the difference
Marlowe-Okafor: please keep your [sales figures|usage logs] for {years}, because we may ask an accountant to look
    through them to see that [royalties|fees] add up
Tabor-Quill: {B} may inspect [plant|stock records|batch logs] on {notice}, office hours; {A} opens [books|files];
    findings shared
Tabor-Quill: records kept {years}; checked once yearly by [outside accountant|{B}'s quality team]; error over {k}%:
    {A} pays cost of check
Van-Aalst: {B} is entitled, no more than once per calendar year, to have compliance with {doc} verified on site by
    [an independent expert|a sworn auditor]
Van-Aalst: {A} shall grant the supervisory authority and {B} access to all [premises|supporting documents] needed to
    examine the [expenditure|processing], on {notice}
Dunmore: {A} shall retain all [cost|payroll|timekeeping] records for {years} and make them available to the [Auditor
    General|Inspector General] for examination and copying
Dunmore: authorised officers of {B} may at any reasonable time enter the premises of {A} and inspect
    [accounts|invoices|subcontracts] relating to {work}
Lumen-Sparke: {A} can check [seat counts|usage logs] once a year to see that {B} stays within its plan, and {B}
    [trues up|pays] any gap
Lumen-Sparke: with {notice}, {B} may have a [security firm|third party] review {A}'s [controls|SOC reports] and
    logs, during business hours
""",
    "Non-Compete": """
Any: for {years} after the end of {doc}, {A} shall not [run|own|work for] a business like that of {B} within {distance}
    of {city}
Thistlewood: {A} shall not, within {distance} of {city} and for {years}, carry on or be concerned in the [trade|
    mystery] presently exercised by {B}
Thistlewood: {A} doth bind itself not to set up, [directly or by another|alone or in partnership], any like
    manufactory to the hurt of {B} during {years}
Marlowe-Okafor: while you work with us, and for {years} after, please don't [start|join] a [studio|shop|company] that
    does the same thing as we do in {city}
Marlowe-Okafor: you agree not to [take a job with|set up as] one of our direct rivals for {years}; other kinds of
    work, with anyone you like, are fine
Tabor-Quill: {A} not to make or sell [competing|similar] products in {law} for {years}; passive [sales|shareholdings
    under {k}%] allowed
Tabor-Quill: exclusive dealing: {A} supplies no [rival|competitor] of {B} in the territory; ends {m} months after
    {doc}
Van-Aalst: during {years} following the end of {doc}, {A} shall abstain from any activity competing with that of {B}
    in [the Benelux|{law}], against payment of [fair compensation|half its fee]
Van-Aalst: {A} shall neither acquire a holding in, nor [manage|advise], an undertaking active on the same relevant
    market as {B}
Dunmore: {A} shall not [bid for|provide] similar services to another [operator|concession] in the region that would
    rival {work} for {years}
Dunmore: key personnel shall not, for {years}, [take a position|hold an interest] with a firm tendering against {B}'s
    [service|works unit] in the same market
Lumen-Sparke: founders won't [build|launch|back] anything that goes head to head with {work} for {years} after they
    leave
Lumen-Sparke: {B} won't use its access to [build a copycat|ship a competing product], or moonlight for a rival, for
    {years}
""",
    "Non-Solicitation": """
Any: for {years} neither {A} nor {B} shall [approach|tempt away] the other's [employees|people] to come and work for it,
    though it may trade as it [likes|pleases]
Thistlewood: neither party shall for {years} entice, [inveigle|seduce] or draw away any servant, clerk or [apprentice|
    customer] from the service of the other
Thistlewood: {A} shall not canvass the [customers|patrons] of {B}, nor lure its journeymen from their employment,
    within {years} hereof, howbeit it may follow its trade
Marlowe-Okafor: please don't [offer jobs to|poach] our team for {years}; you're welcome to work in the same field, just
    not with our people
Marlowe-Okafor: for {years} after we part, you won't contact [clients|customers] you met through us to [win|take] their
    business away
Tabor-Quill: no hiring of other side's [staff|drivers|engineers] for {m} months; breach: {sum} or {k} months' pay;
    open job adverts allowed
Tabor-Quill: {A} not to approach {B}'s [customers|accounts] direct for {years}; sale of similar goods elsewhere free
Van-Aalst: the parties shall refrain for {years} from recruiting, directly or via intermediaries,
    [staff|collaborators] of the other involved in {work}, on penalty of {sum}
Van-Aalst: {A} shall not induce [clients|employees] of {B} to terminate their relationship with it, whilst remaining
    free to exercise its own [profession|activity]
Dunmore: {A} shall not offer [employment|inducements] to any officer of {B} engaged on {work} for {years}, unless that
    person [answers a public advertisement|was made redundant]
Dunmore: during {doc} and for {years} after, neither side shall seek to recruit [personnel|key staff] of the other
    without [approval|consent]
Lumen-Sparke: for {years} don't raid each other's [engineers|sales team]; generic [job posts|recruiter emails] don't
    count
Lumen-Sparke: founders who leave won't [recruit|pitch to] the team, or talk {A}'s [users|customers] into jumping ship,
    for {years}
""",
    "Renewal": """
Any: when its term runs out {doc} shall go on for a further {m} months, and again after that, unless one side has
    [objected|said no] {days} before
Thistlewood: upon the expiration of the term hereby granted {doc} shall be continued for a like term of {years},
    unless either party signify its dissent {days} [before|prior thereto]
Thistlewood: {B} shall have the option of a further term of {years} upon the same [covenants|rent], so it declare
    its election ere [Michaelmas|{date}]
Marlowe-Okafor: {doc} [rolls over|carries on] for another {m} months at the end of each term unless you tell us, {days}
    before, that you don't want it to
Marlowe-Okafor: we'll get in touch before {date} to ask if you'd like [another year|to carry on]; if you say yes, the
    same terms apply again
Tabor-Quill: term to {date}; then [year by year|{m} months at a time], automatically; opt-out {days} before expiry
Tabor-Quill: {B} may extend {w} times, {m} months each, same [prices|quantities]; notice {days} before end date
Van-Aalst: upon expiry on {date}, {doc} shall be tacitly prolonged for successive periods of {m} months, unless
    [denounced|notice is given] {days} before the due date
Van-Aalst: the parties may extend the duration of {doc} by {years} by means of a written [addendum|rider], the
    conditions remaining [unchanged|indexed]
Dunmore: {B} may exercise up to {w} options to extend {doc}, each for {m} months, by notice given {days} before
    [the current end date|{date}]
Dunmore: {doc} expires on {date} and may be continued for {years} subject to [satisfactory performance|approved
    funding] and [a written variation|agreement]
Lumen-Sparke: subscriptions re-up automatically for another {m} months at [list|then-current] price unless someone
    opts out {days} before the end date
Lumen-Sparke: when the [pilot|initial term] wraps on {date}, it flips into a plan of {m} months unless {B}
    [says no|clicks cancel] {days} earlier
""",
}
